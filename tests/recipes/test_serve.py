"""`herdling serve`: python -m pytest tests/recipes/test_serve.py"""

import subprocess
import sys

import pytest

from herdling.cli import main
from herdling.config import parse
from herdling.errors import ConfigError
from herdling.guard.classifier import Classifier
from herdling.recipes.serve import Config, opener, read, read_adapters, read_size


def test_help_brings_neither_torch_nor_the_server_along():
    code = (
        "import sys; from herdling.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit as end: print(end.code, {'torch', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 set()\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("800M", 800 * 2**20), ("1.5G", 3 * 2**29), ("2 GiB", 2**31), ("4kb", 4096)],
)
def test_sizes(text, size):
    assert read_size("memory", text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "1X", "1 2"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="memory"):
        read_size("memory", text)


def test_the_name_is_that_of_the_folder_or_its_run(tmp_path):
    assert read(Config(str(tmp_path / "demo" / "model"))).name == "demo"
    assert read(Config("owner/name")).name == "name"
    assert read(Config("x", name="own")).name == "own"


def test_keys_come_from_flags_file_and_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    file.write_text("from-file\n\n  spaced \n")
    monkeypatch.setenv("HERDLING_API_KEY", "a,b,,flag")
    keys = read(Config("x", api_key=("flag",), api_key_file=file)).keys
    assert keys == ("flag", "a", "b", "from-file", "spaced")
    monkeypatch.delenv("HERDLING_API_KEY")
    assert read(Config("x")).keys == ()


def test_a_key_that_is_none_never_opens_the_server(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("\n")
    for config in (
        Config("x", api_key=("",)),
        Config("x", api_key_file=file),
        Config("x", api_key_file=tmp_path / "no"),
    ):
        with pytest.raises(ConfigError, match="api_key"):
            read(config)


def test_a_container_is_told_through_the_environment(monkeypatch):
    for name, value in (("MODEL", "a/m"), ("NAME", "own"), ("HOST", "0.0.0.0"), ("PORT", "8080")):
        monkeypatch.setenv(f"HERDLING_{name}", value)
    config = parse(Config, [], prog="herdling serve")
    assert (config.path, config.name, config.host, config.port) == ("a/m", "own", "0.0.0.0", 8080)
    assert parse(Config, ["b", "--port", "1"], prog="herdling serve").port == 1
    monkeypatch.setenv("HERDLING_PORT", "http")
    with pytest.raises(ConfigError, match="HERDLING_PORT"):
        parse(Config, [], prog="herdling serve")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_images", -1), ("max_megapixels", float("nan")), ("request_seconds", -1.0),
     ("shutdown_seconds", float("inf"))],
)  # fmt: skip
def test_limits_that_are_none(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}; it must be 0 or more"):
        read(Config("x", **{name: value}))


def test_a_model_is_needed(capsys, monkeypatch):
    monkeypatch.delenv("HERDLING_MODEL", raising=False)
    assert main(["serve"]) == 2
    assert "HERDLING_MODEL" in capsys.readouterr().err


def test_only_a_local_server_without_keys_judges_names():
    assert "localhost" in read(Config("x")).trusted
    assert "mine.local" in read(Config("x", trust_host=("mine.local",))).trusted
    assert read(Config("x", api_key=("k",))).trusted == ()
    assert read(Config("x", host="0.0.0.0")).trusted == ()


def test_limits_and_pictures(tmp_path):
    settings = read(
        Config(
            "x",
            max_body="1M",
            max_queue=5,
            request_seconds=0,
            image_folder=tmp_path,
            image_host=("a.b",),
        )
    )
    assert (settings.limits.body_bytes, settings.limits.queue, settings.limits.seconds) == (
        2**20,
        5,
        None,
    )
    assert (settings.pictures.folder, settings.pictures.hosts) == (tmp_path, ("a.b",))
    with pytest.raises(ConfigError, match="image_folder"):
        read(Config("x", image_folder=tmp_path / "no"))
    with pytest.raises(ConfigError, match="max_queue"):
        read(Config("x", max_queue=0))


def test_adapters():
    assert read_adapters(("a=b/c", "d=e=f")) == {"a": "b/c", "d": "e=f"}
    for bad in (("a",), ("=b",), ("a=",), ("a=b", "a=c")):
        with pytest.raises(ConfigError, match="adapter"):
            read_adapters(bad)
    for given in ({"name": "a"}, {"alias": ("b", "a")}):
        with pytest.raises(ConfigError, match="adapter a: the model itself answers to that name"):
            read(Config("x", adapter=("a=folder",), **given))


def test_safeguards_are_opened_when_the_model_is(tmp_path):
    assert opener((), None, None) is None
    Classifier(["S1"]).save(tmp_path / "guard")
    opened = opener((str(tmp_path / "guard"),), None, None)
    assert opened is not None
    judge = opened()
    assert judge.name == "guard"
    assert judge.judge([{"role": "user", "content": "hello"}]).safe


def test_a_policy_needs_a_guard(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("actions: {default: log}\n")
    with pytest.raises(ConfigError, match="nothing judges"):
        read(Config("x", guard_policy=file))
    settings = read(Config("x", guard=("y",), guard_policy=file))
    assert settings.policy is not None
    assert settings.policy.of("S1") == "log"
