"""Settings: typed dataclasses, read from YAML and flags, written back as YAML.

The dataclasses are the truth. `parse` turns one into flags (through tyro), with `--config run.yaml`
as the defaults that flags override; `load` and `save` read and write the YAML alone. A key that is
not a field is an error that names the nearest one. Left out on purpose: including one YAML file in
another, interpolation, and environment variables.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from herdling.errors import ConfigError
from herdling.files import atomic_file

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str], prog: str) -> T:
    """Make a `kind` of command-line arguments; `--config FILE` among them gives the defaults.

    Raises ConfigError for a file or for flags that do not fit, and SystemExit (0) after `--help`.
    """
    import tyro

    file, rest = _take_config(args)
    given = {} if file is None else {"default": _build(kind, _read_yaml(file), str(file), "", True)}
    about = f"{kind.__doc__ or ''}\n\nWith --config FILE.yaml its values are the defaults."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(kind, prog=prog, description=about.strip(), args=rest, **given)
    except SystemExit as end:
        if end.code != 2:
            raise
        raise ConfigError(_in_a_line(said.getvalue(), prog)) from None
    sys.stderr.write(said.getvalue())
    return config


def _in_a_line(box: str, prog: str) -> str:
    """tyro's complaint, which is a box of many lines; one that is not known is given as it is."""
    inner = [re.sub(r"^[|\u2502]|[|\u2502]$", "", row).strip() for row in box.splitlines()[1:]]
    rows = ["" if re.fullmatch(r"[-+\u2500-\u257f]*", row) else row for row in inner]
    blocks = [part.split("\n") for part in re.split(r"\n{2,}", "\n".join(rows).strip("\n"))]
    message, more = " ".join(blocks[0]).rstrip(".") or "unusable flags", f"; see {prog} --help"
    if found := re.fullmatch(r"Error parsing (\S+): .*?(\[.*\]|'.*'|\".*\")", message):
        flag, value = found[1], found[2].strip("[]")
        names = [row.split(" ", 1)[1] for row in rows if row.startswith(f"{flag} ")]
        kind = names[0].removeprefix("{None}|") if names else ""
        return f"{flag} is {value}; it must be {_METAVARS.get(kind, kind)}" if kind else message
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", message):  # fmt: skip
        options = ", ".join(sorted(re.findall(r"'(.*?)'", found[3])))
        return f"{found[2]} is {found[1]!r}; it must be one of {options}"
    if found := re.fullmatch(r"Missing value for argument '(.*)'. Expected (\d+) values", message):
        return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}{more}"
    if found := re.fullmatch(r"Unrecognized options: (.*)", message):
        flags = [word for word in found[1].split(", ") if word.startswith("-")]
        close = [row.split(" ")[0] for rows in blocks for row in rows if row.startswith("--")]
        hint = f"; did you mean {' or '.join(close)}?" if close and flags else more
        if not flags and blocks[1][0].startswith("Available subcommands: "):
            hint = "; there are " + " ".join(blocks[1]).removeprefix("Available subcommands: ")
        return f"{flags[0] if flags else found[1].split(', ')[0]} is unknown{hint}"
    if blocks[0][0].startswith("Missing from"):
        names = [row for row in blocks[0] if re.fullmatch(r"--[\w.-]+ \S+|[A-Z][A-Z_]*", row)]
        return f"missing: {', '.join(names)}{more}" if names else message + more
    return message + more


_METAVARS = {"INT": "a whole number", "FLOAT": "a number", "{FLOAT FLOAT}": "two numbers"}
"""tyro's words for types in words."""


def load(kind: type[T], path: Path | str) -> T:
    """Read a whole `kind` from a YAML file; raises ConfigError naming the file and the key."""
    return _build(kind, _read_yaml(Path(path)), str(path), "", False)


def save(config: Any, path: Path | str) -> None:
    """Write a config dataclass as YAML, atomically; `load` gives an equal one back."""
    with atomic_file(path) as temporary:
        temporary.write_text(dump(config), "utf-8")


def dump(config: Any) -> str:
    """A config dataclass as YAML text, in the order of its fields."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)


def plain(value: Any) -> Any:
    """A config as mappings, lists, strings and numbers only."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def flat(config: Any) -> dict[str, Any]:
    """A config's plain values by dotted name: {"optimizer.learning_rate": 0.001, ...}."""
    return dict(_leaves(plain(config)))


def differences(old: Any, new: Any) -> list[str]:
    """What changed between two configs, one `key: old -> new` a line."""
    before, after = flat(old), flat(new)
    keys = list(dict.fromkeys([*before, *after]))
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()


def _leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{at}.{key}" if at else key)
    else:
        yield at, value


def nearest(word: str, words: Sequence[str]) -> str:
    """'; did you mean X?' for the closest of `words`, or the list of them all."""
    close = difflib.get_close_matches(word.replace("-", "_"), words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(words)}"


def _take_config(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) from the other arguments."""
    file, rest, waiting = None, [], list(args)
    while waiting:
        arg = waiting.pop(0)
        if arg == "--":
            return file, [*rest, arg, *waiting]
        if arg != "--config" and not arg.startswith("--config="):
            rest.append(arg)
            continue
        if file is not None:
            raise ConfigError("--config is given twice; remedy: put the settings in one file")
        if arg == "--config" and (not waiting or waiting[0].startswith("--")):
            raise ConfigError("--config needs a file; remedy: --config run.yaml")
        file = Path(arg.removeprefix("--config=") if "=" in arg else waiting.pop(0))
    return file, rest


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(problem).split())}") from None
    return {} if raw is None else raw


def _build(kind: Any, raw: Any, file: str, at: str, partial: bool) -> Any:
    """A dataclass from a mapping. With `partial`, required fields may be absent: flags fill them."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: {at or 'the file'} is {raw!r}; it must be a mapping")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [f.name for f in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for key, value in raw.items():
        where = f"{at}.{key}" if at else str(key)
        if key not in names:
            raise ConfigError(f"{file}: unknown key {where}{nearest(str(key), names)}")
        values[key] = _value(hints[key], value, file, where, partial)
    if not partial:
        for f in dataclasses.fields(kind):
            if f.name not in values and not _has_default(f):
                where = f"{at}.{f.name}" if at else f.name
                raise ConfigError(f"{file}: {where} is required; remedy: add '{where}: ...'")
        return kind(**values)
    # Built without __init__: checks in __post_init__ wait until tyro has the flags as well.
    config = object.__new__(kind)
    for f in dataclasses.fields(kind):
        value = values[f.name] if f.name in values else _default(f, hints[f.name], file)
        object.__setattr__(config, f.name, value)
    return config


def _has_default(f: dataclasses.Field) -> bool:
    return not (f.default is f.default_factory is dataclasses.MISSING)


def _default(f: dataclasses.Field, hint: Any, file: str) -> Any:
    import tyro

    if f.default is not dataclasses.MISSING:
        return f.default
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    if dataclasses.is_dataclass(bare(hint)):
        return _build(bare(hint), {}, file, f.name, True)
    return tyro.MISSING


def bare(hint: Any) -> Any:
    """The type beneath `Annotated`, which tyro uses for positional arguments."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _value(hint: Any, raw: Any, file: str, at: str, partial: bool) -> Any:
    """`raw` from YAML as the type of a field; nothing is guessed beyond what YAML itself blurs."""
    hint = bare(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, raw, file, at, partial)
    if origin in (Union, types.UnionType):
        for arm in inner:
            try:
                return _value(arm, raw, file, at, partial)
            except ConfigError as error:
                if dataclasses.is_dataclass(bare(arm)) and isinstance(raw, dict):
                    raise error from None
    elif origin in (list, tuple) and isinstance(raw, list):
        repeated = origin is list or inner[-1] is Ellipsis
        kinds = [inner[0]] * len(raw) if repeated else list(inner)
        if len(kinds) == len(raw):
            items = [_value(k, v, file, f"{at}[{i}]", partial) for i, (k, v) in enumerate(zip(kinds, raw, strict=True))]  # fmt: skip
            return origin(items)
    elif origin is dict and isinstance(raw, dict):
        return {str(k): _value(inner[1], v, file, f"{at}.{k}", partial) for k, v in raw.items()}
    elif origin is Literal:
        if any(raw == option and type(raw) is type(option) for option in inner):
            return raw
        options = ", ".join(str(option) for option in inner)
        raise ConfigError(f"{file}: {at} is {raw!r}; it must be one of {options}")
    elif hint is Any or (hint in (bool, int, str, types.NoneType) and type(raw) is hint):
        return raw
    elif hint is Path and isinstance(raw, str):
        return Path(raw)
    elif hint is float and not isinstance(raw, bool) and isinstance(raw, int | float | str):
        # YAML 1.1 reads 1e-3 (no point) as a string.
        number = _number(raw)
        if number is not None:
            return number
    raise ConfigError(f"{file}: {at} is {raw!r}; it must be {_name(hint)}")


def _number(raw: float | str) -> float | None:
    try:
        number = float(raw)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _name(hint: Any) -> str:
    """A type in words for an error."""
    hint = bare(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(arm) for arm in inner)
    if origin in (list, tuple):
        repeated = origin is list or inner[-1] is Ellipsis
        return f"a list of {_name(inner[0])}" if repeated else f"a list of {len(inner)} values"
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in inner)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string",
             Path: "a path", types.NoneType: "null", dict: "a mapping"}  # fmt: skip
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))
