"""The inside of `herdling.tasks.sandbox`: runs as a process of its own and confines itself first.

    python -I -S -B jail.py < request.json > output

Standard library only. The request holds setup, code, expressions and limits. The process imports the harmless
modules that the code names, then gives up for good, by a seccomp filter of the kernel, everything but
computing and writing to the pipes it has: no file can be opened, no process or thread started, no
socket made, no signal sent. Only then it runs the code. The first line of its output says "confined", or
why not; the last is the reply, and what the code printed stands between.

The filter is a list of what is allowed (seccomp(2), linux/filter.h), so that a call which a newer
kernel brings is refused as well.
"""

# Each import is paid by each run: these are what Python starts with, and json, struct and ctypes.
from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MODULES = frozenset((
    "abc", "array", "ast", "bisect", "calendar", "cmath", "collections", "contextlib", "copy",
    "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq",
    "html", "itertools", "json", "keyword", "math", "numbers", "operator", "random", "re", "statistics",
    "string", "struct", "textwrap", "time", "types", "typing", "unicodedata", "uuid", "zlib",
))  # fmt: skip
"""What the code may import. They hold nothing back: the kernel does."""
_LATER = {
    "collections": ("collections.abc",), "most_common": ("heapq",), "mode": ("heapq",), "strptime": ("_strptime",),
    "singledispatch": ("types", "typing", "weakref"), "uuid3": ("hashlib",), "uuid5": ("hashlib",),
    "get_docstring": ("inspect",), "\\N{": ("unicodedata",),
}  # fmt: skip
"""Words, and the modules that Python imports when they are first used, which is too late."""

# Numbers of the system calls that remain: memory, clocks, locks, the pipes, and the end.
_CALLS = {
    "x86_64": (0xC000003E, {
        "read": 0, "write": 1, "close": 3, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "writev": 20,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60,
        "gettimeofday": 96, "getrusage": 98, "times": 100, "sigaltstack": 131, "gettid": 186,
        "time": 201, "futex": 202, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
    }),
    "aarch64": (0xC00000B7, {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "writev": 66, "exit": 93, "exit_group": 94,
        "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114,
        "clock_nanosleep": 115, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132,
        "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153,
        "getrusage": 165, "gettimeofday": 169, "getpid": 172, "gettid": 178, "brk": 214,
        "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
    }),
}  # fmt: skip
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_SET_DUMPABLE, _SET_DEATH_SIGNAL, _SIGKILL = 4, 1, 9
_CAPABILITIES = 0x20080522  # capset(2), version 3: three sets of 64 bits
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000  # refuse with EPERM
_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000  # user, network, System V IPC


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def missing() -> str:
    """Why this machine cannot confine a process; empty if it can, as far as can be told from outside."""
    if sys.platform != "linux":
        return f"{sys.platform} has no seccomp"
    if os.uname().machine not in _CALLS or struct.calcsize("P") != 8:
        return f"the system calls of {os.uname().machine} are not listed here"
    return ""


def confine() -> None:
    """Give up everything but computing; raises OSError if the kernel does not play along."""
    if problem := missing():
        raise OSError(problem)
    libc = ctypes.CDLL(None, use_errno=True)
    # Namespaces hold nothing that the filter does not; where they are to be had, they are a second wall.
    libc.unshare(_NAMESPACES)
    limit(resource.RLIMIT_NPROC, 0)
    limit(resource.RLIMIT_NOFILE, 3)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses no_new_privs")
    # The filter sees numbers of calls; what root may do by the arguments of those that remain (ruin
    # memory with madvise, lock it with mmap) goes with root's capabilities.
    header, held = struct.pack("Ii", _CAPABILITIES, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, held) or (any(held.raw) and libc.capset(header, bytes(24))):
        raise OSError(ctypes.get_errno(), "the kernel keeps the capabilities")
    libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)  # RLIMIT_CORE is not asked where cores go to a program
    # Who would end it after its time may be killed; asked last, as other rights would undo it.
    libc.prctl(_SET_DEATH_SIGNAL, _SIGKILL, 0, 0, 0)
    code = _filter()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refuses seccomp filters")


def limit(kind: int, most: int) -> None:
    """Lower a resource limit for good."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _filter() -> bytes:
    """A BPF program (linux/filter.h): kill for a foreign architecture, allow what is listed, refuse."""
    architecture, calls = _CALLS[os.uname().machine]
    load, equal, give = 0x20, 0x15, 0x06
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),  # seccomp_data.nr
    ]
    numbers = sorted(calls.values())
    for i, number in enumerate(numbers):
        program.append((equal, len(numbers) - i, 0, number))  # to the last instruction
    program += [(give, 0, 0, _REFUSE), (give, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def plain(value: Any, depth: int = 0) -> Any:
    """What JSON can hold of a value: tuples are lists, sets and the pairs of a dict are sorted lists."""
    if depth > 50:
        raise ValueError("a value is nested more than 50 deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, depth + 1) for item in value), key=json.dumps)
    if isinstance(value, dict):
        pairs = [[plain(k, depth + 1), plain(v, depth + 1)] for k, v in value.items()]
        return {"": sorted(pairs, key=lambda pair: json.dumps(pair[0]))}
    raise ValueError(f"a value of type {type(value).__name__}")


def _write(text: str) -> None:
    left = text.encode("utf-8", "replace")
    while left:
        left = left[os.write(1, left) :]


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    limit(resource.RLIMIT_CPU, request["cpu"])
    limit(resource.RLIMIT_AS, request["memory"])
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)
    _import("\n".join((request["setup"], request["code"], *request["calls"])))
    try:
        confine()
    except (OSError, ValueError) as problem:
        _write(f"{problem}\n")
        return
    _write("confined\n")
    names: dict[str, Any] = {"__name__": "__main__"}
    values: list[Any] = []
    error = ""
    try:
        for code in (request["setup"], request["code"]):
            exec(compile(code, "code", "exec", dont_inherit=True), names)
        for call in request["calls"]:
            values.append(plain(eval(call, names)))
    except BaseException as problem:  # also SystemExit: code that leaves has not answered
        error = f"{type(problem).__name__}: {problem}"[:500]
    sys.stdout.flush()
    _write("\n" + json.dumps({"values": values, "error": error}) + "\n")
    os._exit(0)  # nothing that the code left behind runs or writes after the reply


def _import(code: str) -> None:
    """Load the allowed modules that `code` names, and what its words import when they are used.

    What is not found is told when the code asks for it.
    """
    named = " ".join(re.findall(r"\b(?:import|from)\b([^\n;]*)", code))
    asked = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)*", named))
    wanted = [name for name in sorted(asked) if name.partition(".")[0] in MODULES]
    wanted += [module for word, modules in _LATER.items() if word in code for module in modules]
    for module in wanted:
        try:  # noqa: SIM105 (contextlib is not among the imports)
            __import__(module)
        except ImportError:
            pass


if __name__ == "__main__":
    main()
