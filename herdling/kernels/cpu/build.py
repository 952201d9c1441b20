"""Compile the C++ beside this file for this machine, once, into a private cache.

    from herdling.kernels.cpu.build import compiled
    compiled("native")   # -> path of a shared library; BuildError says why there is none

The name of a library is a hash of everything that could change it: sources, compiler, flags and
processor, so a home folder shared between machines holds one for each. Several processes may ask at
once: one compiles, the others wait, a reader never sees half a file, and a damaged one is made again. Left out: shipping binaries.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=fast"]  # fmt: skip
X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS = {
    "native": ["-march=native"],
    "avx2": ["-march=x86-64-v3"],
    "plain": ["-march=x86-64"] if X86 else [],
}
"""What to compile for: this processor, or less of it. `avx2` only on x86."""


class BuildError(Exception):
    """No library; the message is one line that says why."""


def compiler() -> list[str]:
    """The command of a C++ compiler: $CXX if set, else g++ or clang++."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        try:
            command = shlex.split(name)
        except ValueError as error:
            raise BuildError(f"CXX={asked}: {error}") from None
        if command and shutil.which(command[0]):
            return command
    raise BuildError(f"CXX={asked}: no such program" if asked else "no g++ or clang++ in PATH")


def compiled(variant: str) -> Path:
    """Path of the shared library for `variant`, compiled if it is not in the cache."""
    if variant not in VARIANTS or (variant == "avx2" and not X86):
        raise BuildError(f"unknown variant {variant!r}; known here: {', '.join(VARIANTS)}")
    command = [*compiler(), *FLAGS, *VARIANTS[variant]]
    library = cache_folder() / f"{_fingerprint(command)}-{variant}.so"
    note = library.with_suffix(".lock")
    if _whole(library, note):
        return library
    try:
        with open(note, "a") as lock:  # not "w": another process may have noted its library by now
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system lets go of it when a process dies
            if not _whole(library, note):
                _compile(command, library)
                lock.truncate(0)
                lock.write(_digest(library))
    except OSError as error:
        raise BuildError(
            f"{library.parent}: {error}; set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return library


def _whole(library: Path, note: Path) -> bool:
    """Whether the library is what was compiled: loading half a file ends the process."""
    try:
        return note.read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/herdling/native (~/.cache by default), ours alone: what lies there is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "herdling" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{folder}: {error}; set XDG_CACHE_HOME to a folder of yours") from None
    if state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) & 0o022:
        raise BuildError(f"{folder}: others can write there; remedy: chmod 700, or XDG_CACHE_HOME")
    return folder


def _fingerprint(command: list[str]) -> str:
    call = [*command[:1], "--version"]
    try:
        told = subprocess.run(call, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    digest = hashlib.sha256()
    for part in (shlex.join(command), told.stdout, platform.platform(), _processor()):
        digest.update(part.encode() + b"\0")
    for source in SOURCES + HEADERS:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    kept = {line for line in lines if line.split(":")[0].strip() in wanted}
    return "\n".join(sorted(kept))


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        out = Path(folder) / "library.so"
        call = [*command, *map(str, SOURCES), "-o", str(out)]
        try:
            run = subprocess.run(call, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]}: {error}") from None
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if line.strip()]
            said.sort(key=lambda line: "error" not in line)
            why = said[0][:200] if said else "it does not say why"
            raise BuildError(f"{command[0]} failed (exit status {run.returncode}): {why}")
        out.chmod(0o700)
        os.replace(out, library)
