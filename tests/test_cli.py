"""python -m pytest tests/test_cli.py"""

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
import types
import typing
import warnings

import pytest

import herdling
from herdling import cli
from herdling.config import bare
from herdling.errors import ConfigError, DataError
from herdling.train.signals import Stopped


@dataclasses.dataclass(frozen=True)
class Config:
    """Play a recipe."""

    steps: int = 1
    """How often."""
    resume: bool = False
    """Go on."""


@pytest.fixture
def verb(monkeypatch):
    """Install a recipe whose `main` is the given function, as the verb `play`."""

    def install(main):
        recipe = types.ModuleType("herdling.recipes.play")
        recipe.Config, recipe.main = Config, main  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "herdling.recipes.play", recipe)
        monkeypatch.setitem(cli.VERBS, "play", "Play a recipe.")

    return install


def raising(error):
    def main(config):
        raise error

    return main


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_is_fast_and_imports_nothing_heavy():
    heavy = "{'torch', 'numpy', 'transformers', 'tyro', 'rich', 'yaml'}"
    code = (
        "import sys; from herdling.cli import main; status = main(['--help']);"
        f"print('loaded:', sorted({heavy} & set(sys.modules))); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("-c", code)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert "loaded: []" in done.stdout
    assert all(name in done.stdout for name in cli.VERBS)
    assert min(seconds) < 0.3, f"took {seconds} s"


def test_help_of_a_verb_loads_no_torch():
    code = (
        "import contextlib, io, sys; from herdling.cli import main\n"
        f"for verb in {list(cli.VERBS)}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        main([verb, '--help'])\n"
        "    assert f'usage: herdling {verb}' in said.getvalue(), verb\n"
        "    assert 'torch' not in sys.modules, verb\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_torch():
    assert run("-c", "import sys, herdling; assert 'torch' not in sys.modules").returncode == 0


def test_version_and_no_verb(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"herdling {herdling.__version__}\n"
    assert cli.main([]) == 2
    assert "usage: herdling" in capsys.readouterr().err


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["pretrian"]) == 2
    assert capsys.readouterr().err == (
        "herdling: error: unknown verb 'pretrian'; did you mean pretrain?\n"
    )


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_main_returns(verb, returned, status):
    verb(lambda config: returned)
    assert cli.main(["play", "--steps", "3"]) == status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("a.txt:3: broken"), 1, "herdling: error: a.txt:3: broken\n"),
        (ConfigError("steps is 0"), 2, "herdling: error: steps is 0\n"),
        (OSError(28, "No space left on device"), 1, "herdling: error: No space left on device\n"),
        (OSError(17, "File exists", "runs/x"), 1, "herdling: error: runs/x: File exists\n"),
        (OSError(21, "Is a directory", ".x.1", None, "x"), 1, "herdling: error: x: Is a directory\n"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_status(verb, capsys, monkeypatch, error, status, line):
    monkeypatch.delenv("HERDLING_DEBUG", raising=False)
    verb(raising(error))
    assert cli.main(["play"]) == status
    assert capsys.readouterr() == ("", line)


def test_debug_shows_the_trace(verb, monkeypatch):
    verb(raising(DataError("broken")))
    with pytest.raises(DataError):
        cli.main(["play", "--debug"])
    monkeypatch.setenv("HERDLING_DEBUG", "1")
    with pytest.raises(DataError):
        cli.main(["play"])


def test_a_bug_is_not_dressed_up_as_an_error(verb):
    verb(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["play"])


def test_bad_flags_are_status_2(verb, capsys):
    verb(lambda config: None)
    assert cli.main(["play", "--stepz", "3"]) == 2
    line = "herdling: error: --stepz is unknown; did you mean --steps?\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(verb, capsys, number, status):
    verb(raising(Stopped("stopped after step 7, saved in runs/a", number)))
    assert cli.main(["play", "--steps", "9"]) == status
    assert capsys.readouterr().err == (
        "herdling: stopped after step 7, saved in runs/a\n"
        "to go on: herdling play --steps 9 --resume\n"
    )


def test_ctrl_c_elsewhere_is_quiet_too(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["play", "--resume"]) == 130
    assert capsys.readouterr().err == "herdling: stopped\nto go on: herdling play --resume\n"


def test_warnings_are_one_line_and_the_filter_is_given_back(verb, capsys):
    before = warnings.formatwarning

    def main(config):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            sys.stderr.write(warnings.formatwarning("old scale", UserWarning, "f.py", 1))

    verb(main)
    assert cli.main(["play"]) == 0
    assert capsys.readouterr().err == "herdling: warning: old scale\n"
    assert warnings.formatwarning is before


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from herdling.__main__ import main; sys.exit(main(['env']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_a_recipe_with_complete_help(name, capsys):
    recipe = importlib.import_module(f"herdling.recipes.{name.replace('-', '_')}")
    assert (recipe.Config.__doc__ or "").splitlines()[0] == cli.VERBS[name]
    assert callable(recipe.main)
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for flag, sentence in described(recipe.Config):
        assert sentence, f"{name}: {flag} has no sentence"
        assert sentence.split(".")[0][:30] in shown, f"{name} --help lacks {flag}"


def described(kind: type, at: str = "") -> list[tuple[str, str | None]]:
    """Each flag of a config with its help, as tyro reads it."""
    from tyro._docstrings import get_field_docstring

    found = []
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        inner = bare(hints[field.name])
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            found += described(inner, f"{at}{field.name}.")
        else:
            found.append((f"--{at}{field.name}", get_field_docstring(kind, field.name, ())))
    return found
