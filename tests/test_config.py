"""python -m pytest tests/test_config.py"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tyro.conf import Positional

from herdling import config
from herdling.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    """A section."""

    rate: float = 0.1
    """How fast."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""
    rules: tuple[str, ...] = ()
    """Some words."""


@dataclass(frozen=True)
class Config:
    """Do a thing."""

    path: Positional[str]
    """What to do it to."""
    out: Path
    """Where to put it."""
    steps: int = 10
    """How often."""
    kind: Literal["a", "b"] = "a"
    """Which way."""
    clip: float | None = 1.0
    """A bound, or none."""
    resume: bool = False
    """Go on."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes by name."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, "utf-8")
    return path


numbers = st.floats(allow_nan=False)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Config,
        path=words,
        out=words.map(Path),
        steps=st.integers(min_value=1),
        kind=st.sampled_from(["a", "b"]),
        clip=st.none() | numbers,
        resume=st.booleans(),
        sizes=st.dictionaries(words, st.integers(), max_size=3),
        inner=st.builds(
            Inner,
            rate=numbers,
            betas=st.tuples(numbers, numbers),
            rules=st.lists(words, max_size=3).map(tuple),
        ),
    )
)
def test_saved_config_loads_equal(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    config.save(value, path)
    assert config.load(Config, path) == value


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = write(tmp_path, "path: p\nsteps: 20\nclip: null\ninner: {rate: 1e-3, rules: [x, y]}\n")
    got = config.parse(
        Config,
        ["--config", str(file), "--out", "o", "--steps", "30", "--inner.betas", "0", "0.5"],
        "t",
    )
    inner = Inner(rate=1e-3, betas=(0.0, 0.5), rules=("x", "y"))
    assert got == Config("p", Path("o"), 30, clip=None, inner=inner)
    # A positional argument given as well wins too.
    got = config.parse(Config, ["q", f"--config={file}", "--out", "o"], "t")
    assert (got.path, got.steps) == ("q", 20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key stepz; did you mean steps?"),
        ("inner: {raet: 3}", "unknown key inner.raet; did you mean rate?"),
        ("zzzzzz: 3", "unknown key zzzzzz; there are: path, out, steps"),
        ("steps: many", "steps is 'many'; it must be a whole number"),
        ("steps: 1.5", "steps is 1.5; it must be a whole number"),
        ("steps: true", "steps is True; it must be a whole number"),
        ("resume: 1", "resume is 1; it must be true or false"),
        ("path: no", "path is False; it must be a string"),
        ("kind: c", "kind is 'c'; it must be one of a, b"),
        ("clip: x", "clip is 'x'; it must be a number or null"),
        ("inner: {betas: [1]}", r"inner.betas is \[1\]; it must be a list of 2 values"),
        ("inner: {rules: [1]}", r"inner.rules\[0\] is 1; it must be a string"),
        ("inner: 3", "inner is 3; it must be a mapping"),
        ("sizes: [1]", r"sizes is \[1\]; it must be a mapping"),
        ("- 1", "the file is .* must be a mapping"),
        ("a: [", "not valid YAML"),
        ("steps: 3", "path is required; remedy: add 'path: ...'"),
    ],
)
def test_a_bad_file_is_one_line_that_says_what_and_where(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(Config, write(tmp_path, text))
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_name_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        config.load(Config, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="--config needs a file"):
        config.parse(Config, ["--config", "--steps", "3"], "t")
    with pytest.raises(ConfigError, match="given twice"):
        config.parse(Config, ["--config", "a", "--config=b"], "t")


def test_checks_wait_for_the_flags(tmp_path):
    file = str(write(tmp_path, "path: p\nout: o\nsteps: 0\n"))
    assert config.parse(Config, ["--config", file, "--steps", "2"], "t").steps == 2
    with pytest.raises(ConfigError, match="steps is 0"):
        config.parse(Config, ["--config", file], "t")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("p --out o --step 3", "--step is unknown; did you mean --steps?"),
        ("p --out o --zzz 3", "--zzz is unknown; see t --help"),
        ("p --out o more", "more is unknown; see t --help"),
        ("p --out o --steps x", "--steps is 'x'; it must be a whole number"),
        ("p --out o --steps 1.5", "--steps is '1.5'; it must be a whole number"),
        ("p --out o --clip x", "--clip is 'x'; it must be a number"),
        ("p --out o --inner.rate x", "--inner.rate is 'x'; it must be a number"),
        ("p --out o --kind c", "--kind is 'c'; it must be one of a, b"),
        ("p --out o --steps", "--steps needs a value; see t --help"),
        ("p --out o --inner.betas 1", "--inner.betas needs 2 values; see t --help"),
        ("p", "missing: --out PATH; see t --help"),
        ("", "missing: STR, --out PATH; see t --help"),
    ],
)
def test_flags_that_do_not_fit_are_an_error_of_one_line(flags, message, capsys):
    with pytest.raises(ConfigError) as caught:
        config.parse(Config, flags.split(), "t")
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_a_subcommand_that_does_not_exist_names_those_that_do():
    from herdling.recipes import guard

    with pytest.raises(ConfigError, match="trian is unknown; there are train, check, prune"):
        config.parse(guard.Config, ["trian"], "t")
    with pytest.raises(ConfigError, match=r"train, check, prune.*; see t --help"):
        config.parse(guard.Config, [], "t")


def test_what_a_check_warns_of_is_still_said(capsys):
    @dataclass(frozen=True)
    class Loud:
        """Do a thing."""

        steps: int = 1
        """How often."""

        def __post_init__(self) -> None:
            print("careful", file=sys.stderr)

    config.parse(Loud, [], "t")
    assert "careful" in capsys.readouterr().err


def test_a_flag_missing_in_the_file_and_on_the_line_is_named(tmp_path):
    with pytest.raises(ConfigError, match="missing: --out PATH"):
        config.parse(Config, ["--config", str(write(tmp_path, "path: p"))], "t")


def test_help_has_every_field_with_its_sentence_and_the_config_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        config.parse(Config, ["--help"], "herdling thing")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("Do a thing.", "--config FILE.yaml", "How fast.", "--inner.rate", "Which way."):
        assert words in text


def test_differences_name_what_changed():
    old = Config("p", Path("o"))
    new = replace(old, steps=3, inner=Inner(rate=0.5))
    assert config.differences(old, new) == ["steps: 10 -> 3", "inner.rate: 0.1 -> 0.5"]
    assert config.differences(old, old) == []
