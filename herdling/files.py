"""Writes that either happen or do not: a reader never sees half a file or half a folder."""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from herdling.errors import ConfigError, Error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_file(path: Path | None, setting: str) -> None:
    """Raise ConfigError where no file can be written at `path`, before the work that it is to hold."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{setting} is {str(path)!r}, a folder; remedy: the name of a file")
    _check_parents(path, setting)


def check_folder(path: Path, setting: str) -> None:
    """Raise ConfigError where no folder can be at `path`, as a file is there or on the way."""
    if path.is_file():
        raise ConfigError(f"{setting} is {str(path)!r}, a file; remedy: the name of a folder")
    _check_parents(path, setting)


def _check_parents(path: Path, setting: str) -> None:
    for parent in path.parents:
        if parent.is_dir():
            break
        if parent.exists():
            raise ConfigError(f"{setting} is {str(path)!r}, but {parent} is a file")
    else:
        return
    try:
        tempfile.TemporaryFile(dir=parent).close()  # permissions alone do not tell
    except OSError as problem:
        raise ConfigError(
            f"{setting} is {str(path)!r}, but nothing can be written in {parent} ({problem.strerror}); "
            "remedy: another place"
        ) from None


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`.

    A folder already at `path` is moved aside first and removed last, so that at every moment one
    complete folder exists, under `path` or (after a crash between two renames) as `.NAME.old`.
    What killed processes of this machine left half written is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    _sweep(path)
    owner = f".{path.name}.{platform.node()}-{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(prefix=owner, dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        old = path.parent / f".{path.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(path: Path | str) -> None:
    """Undo the one half-way state `atomic_folder` can leave: `.NAME.old` there, `NAME` gone."""
    path = Path(path)
    old = path.parent / f".{path.name}.old"
    if old.exists() and not path.exists():
        os.rename(old, path)


def _sweep(path: Path) -> None:
    """Remove the temporary folders of `path` whose process, on this machine, lives no more."""
    owner = re.compile(re.escape(f".{path.name}.{platform.node()}-") + r"(\d+)\.[^.]*")
    for sibling in path.parent.iterdir():
        match = owner.fullmatch(sibling.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(sibling, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    return True


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path | str, error: type[Error] = Error) -> Any:
    """Parse a JSON file; a missing or broken file raises `error` with its name and the place."""
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    # RecursionError: nested too deep; ValueError: no JSON, no UTF-8, or a number of too many digits.
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}") from None
