"""python -m pytest tests/tasks/test_sandbox.py: what a model's code computes, and all that it cannot do.

The escapes are tried three times: as the sandbox is, as if the kernel refused namespaces, and as a
user without rights (where the tests run as root).
"""

import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from herdling.errors import ConfigError
from herdling.tasks import jail, sandbox
from herdling.tasks.sandbox import Limits, Outcome, SandboxError, run

if jail.missing():
    pytest.skip(f"foreign code cannot be confined here: {jail.missing()}", allow_module_level=True)

SOURCE = Path(jail.__file__).read_text("utf-8")
VARIANTS = {
    "plain": lambda source: source,
    "without namespaces": lambda source: source.replace(
        "    libc.unshare(_NAMESPACES)\n", "    assert libc.unshare(-1) == -1\n"
    ),
    "as nobody": lambda source: source.replace(
        "def main() -> None:\n",
        "def main() -> None:\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n",
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "as nobody" and os.geteuid() != 0:
        pytest.skip("these tests run without rights already")
    changed = VARIANTS[request.param](SOURCE)
    assert (changed == SOURCE) == (request.param == "plain")
    (tmp_path / "jail.py").write_text(changed)
    monkeypatch.setattr(jail, "__file__", str(tmp_path / "jail.py"))
    return request.param


def test_values_of_calls() -> None:
    code = "def double(x):\n    print('hm')\n    return 2 * x"
    outcome = run(
        code, ["double(4)", "double('ab')", "double((1, [2]))", "{3, 1}", "{1: None}", "0.5"]
    )
    assert outcome.values == [8, "abab", [1, [2], 1, [2]], [1, 3], {"": [[1, None]]}, 0.5]
    assert outcome.printed == "hm\nhm\nhm"
    assert outcome.error == ""
    assert 0 < outcome.seconds < 60


def test_modules_that_compute_are_there() -> None:
    code = "\n".join(f"import {name}" for name in sorted(jail.MODULES))
    calls = [
        "math.isqrt(10)", "re.findall('a+', 'aab')", "str(decimal.Decimal(1) / 4)", "json.loads('[1]')",
        "collections.Counter('aab')['a']", "datetime.datetime.strptime('2020-02-29', '%Y-%m-%d').day",
        "hashlib.sha256(b'a').hexdigest()[:4]", "0 <= random.random() < 1", "sorted(itertools.product('ab', '1'))[1]",
        "fractions.Fraction(1, 3) + 1 == fractions.Fraction(4, 3)", "unicodedata.name('\\u00e9')[:5]",
        "len(uuid.uuid4().hex)", "statistics.mean([1, 2, 3])", "time.time() > 0",
    ]  # fmt: skip
    outcome = run(code, calls)
    assert outcome.error == ""
    assert outcome.values == [3, ["aa"], "0.25", [1], 2, 29, "ca97", True, ["b", "1"], True, "LATIN", 32, 2, True]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "call", "value"),
    [
        ("from collections import Counter", "Counter('banana').most_common(1)", [["a", 3]]),
        ("from collections import Counter\nc = Counter('aab')", "c.most_common(1)", [["a", 2]]),
        ("from statistics import mode", "mode([1, 1, 2])", 1),
        ("import time", "time.strptime('2020-02-29', '%Y-%m-%d').tm_mday", 29),
        ("from functools import singledispatch\n@singledispatch\ndef f(x): return 0\n@f.register\ndef _(x: int): return 1", "f(7)", 1),
        ("import functools\nf = functools.singledispatch(lambda x: 0)\nf.register(int, lambda x: 1)", "f(7)", 1),
        ("import uuid", "str(uuid.uuid5(uuid.NAMESPACE_DNS, 'a.org'))[:3]", "d47"),
        ("import ast", "ast.get_docstring(ast.parse('\"hm\"'))", "hm"),
        ("x = '\\N{BULLET}'", "x", "\u2022"),
    ],
)  # fmt: skip
def test_what_modules_import_when_they_are_used(code: str, call: str, value: object) -> None:
    outcome = run(code, [call])
    assert (outcome.values, outcome.error) == ([value], "")


def test_code_is_compiled_by_its_own_rules() -> None:
    """This package postpones annotations; code does where it says so, after a setup as well."""
    code = "def f(x: int): return x"
    assert run(code, ["f.__annotations__['x'] is int"]).values == [True]
    postponed = f"from __future__ import annotations\n{code}"
    outcome = run(postponed, ["f.__annotations__", "y"], setup="y = 3")
    assert (outcome.values, outcome.error) == ([{"": [["x", "int"]]}, 3], "")
    assert run("y = 1", ["y"], setup="y =").error.startswith("SyntaxError")
    assert run("import math", ["re.sub('a', 'b', 'a')"], setup="import re").values == ["b"]


def test_dictionaries_and_sets_have_one_order() -> None:
    calls = ["{'b': 1, 'a': {2: 0, 1: 0}}", "{'a': {1: 0, 2: 0}, 'b': 1}", "{'b', 'a'}"]
    first, second, letters = run("", calls).values
    assert first == second == {"": [["a", {"": [[1, 0], [2, 0]]}], ["b", 1]]}
    assert letters == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "call", "error"),
    [
        ("x = 1 +", "1", "SyntaxError: invalid syntax"),
        ("x = \0", "1", "SyntaxError: source code string cannot contain null bytes"),
        ("", "1/0", "ZeroDivisionError: division by zero"),
        ("", "x =", "SyntaxError: invalid syntax"),
        ("def f():\n    f()", "f()", "RecursionError"),
        ("x = 'a' * 10**9", "1", "MemoryError"),
        ("", "object()", "ValueError: a value of type object"),
        ("x = []\nx.append(x)", "x", "ValueError: a value is nested more than 50 deep"),
        ("raise SystemExit(0)", "1", "SystemExit: 0"),
        ("import numpy", "1", "ModuleNotFoundError: No module named 'numpy'"),
        ("import nosuchmodule", "1", "ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("import os\nos._exit(0)", "1", "ended without an answer"),
        ("import ctypes\nctypes.string_at(0)", "1", "ended without an answer"),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "1", "ended without an answer"),
        ("#" * 100_001, "1", "more than 100000 characters"),
        ("(" * 5000, "1", "SyntaxError: too many nested parentheses"),
        ("\ud800 = 1", "1", "UnicodeEncodeError"),
    ],
)  # fmt: skip
def test_failures_are_told(code: str, call: str, error: str) -> None:
    outcome = run(code, [call])
    assert outcome.values == []
    assert outcome.error.startswith(error)


def test_values_before_a_failure_are_kept() -> None:
    assert run("", ["1", "1/0", "3"]).values == [1]


@pytest.mark.parametrize(
    "code",
    ["while True: pass", "import time\ntime.sleep(1000)", "x = 1 << 10**11", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
     "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()", "x = 9**9**9",
     "import sys\nclass N:\n    def write(self, text): return 0\n    def flush(self):\n        while True: pass\nsys.stdout = N()",
     "import os\nos.close(0); os.close(2)\nwhile True: pass"],
)  # fmt: skip
def test_nothing_hangs(code: str) -> None:
    outcome = run(code, ["1"], Limits(seconds=0.6, cpu=1))
    assert outcome.values == []
    assert outcome.error.partition(":")[0] in ("timeout", "ended without an answer", "MemoryError")


def test_a_closed_output_is_an_end() -> None:
    outcome = run("import os\nos.close(1)\nwhile True: pass", ["1"], Limits(seconds=50.0))
    assert outcome.error == "ended without an answer"


@pytest.mark.parametrize("code", ["print('a' * 10**7)", "while True: print('aaaa')", "import os\nwhile 1: os.write(1, b'a' * 4096)"])  # fmt: skip
def test_output_is_bounded(code: str) -> None:
    outcome = run(code, ["1"], Limits(output=5000))
    assert outcome.error == "too much output"
    assert len(outcome.printed) <= 5000


def test_printing_buys_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHUNK", 1)  # so there is always something left to read
    flood = "import os\nwhile True: os.write(1, b'a' * 4096)"
    outcome = run(flood, ["1"], Limits(seconds=0.3, output=2**18))
    assert (outcome.values, outcome.error) == ([], "timeout")


def test_memory_is_bounded() -> None:
    grab = "x = []\nwhile True: x.append(bytearray(2**20))"
    assert run(grab, ["1"]).error.startswith("MemoryError")
    # What is caught goes on, within the limit.
    code = "try:\n    x = bytearray(2**28)\nexcept MemoryError:\n    y = bytearray(2**24)"
    assert run(code, ["len(y)"]).values == [2**24]


TRIES = {
    "read a secret": "open({secret!r}).read()",
    "read a system file": "open('/etc/passwd').read()",
    "read own memory": "open('/proc/self/maps').read()",
    "read the parent's environment": "open('/proc/{pid}/environ').read()",
    "write beside the secret": "open({folder!r} + '/x', 'w')",
    "write to /tmp": "open('/tmp/herdling-escape', 'w')",
    "write where it stands": "open('escape', 'w')",
    "append to the secret": "open({secret!r}, 'a')",
    "list a folder": "os.listdir({folder!r})",
    "look at a file": "os.stat({secret!r})",
    "remove": "os.remove({secret!r})",
    "make a folder": "os.mkdir({folder!r} + '/y')",
    "link": "os.symlink({secret!r}, {folder!r} + '/z')",
    "rename": "os.rename({secret!r}, {folder!r} + '/z')",
    "change rights": "os.chmod({secret!r}, 0o777)",
    "change folder": "os.chdir({folder!r})",
    "unnamed file": "os.memfd_create('x')",
    "fork": "os.fork()",
    "fork without end": "[os.fork() for _ in range(10**6)]",
    "exec": "os.execv('/bin/sh', ['sh'])",
    "shell": "os.system('touch ' + {folder!r} + '/x') and 1/0",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {{}})",
    "thread": "__import__('_thread').start_new_thread(print, ())",
    "kill the parent": "os.kill({pid}, 9)",
    "kill everyone": "os.kill(-1, 9)",
    "kill itself": "os.kill(os.getpid(), 19)",
    "another session": "os.setsid()",
    "more memory": "__import__('resource').setrlimit(9, (-1, -1))",
    "be root": "os.setuid(0)",
    "pipe": "os.pipe()",
    "copy a pipe": "os.dup(1)",
    "terminal": "os.openpty()",
}  # fmt: skip


def test_no_escape(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    before = sorted(os.listdir(tmp_path))
    values = {"secret": str(secret), "folder": str(tmp_path), "pid": os.getpid()}
    calls = [f"attempt(lambda: {code.format(**values)})" for code in TRIES.values()]
    code = """
import os
def attempt(what):
    try:
        return repr(what())
    except BaseException as problem:
        return type(problem).__name__
"""
    outcome = run(code, [*calls, "dict(os.environ)"], Limits(seconds=30))
    assert outcome.error == ""
    *told, environment = outcome.values
    assert environment in ({"": []}, {"": [["LC_CTYPE", "C.UTF-8"]]})  # Python's own, PEP 538
    others = {"thread": "RuntimeError", "shell": "ZeroDivisionError", "more memory": "ValueError"}
    assert dict(zip(TRIES, told, strict=True)) == {
        name: others.get(name, "PermissionError") for name in TRIES
    }
    assert sorted(os.listdir(tmp_path)) == before
    assert secret.read_text() == "hunter2"
    assert not Path("/tmp/herdling-escape").exists()
    assert "hunter2" not in outcome.printed


def test_every_other_system_call_is_refused(variant: str) -> None:
    """With zeros for arguments, straight to the kernel: EPERM before it looks at any of them.

    335 and 336 are not asked: new kernels end a process that makes these calls (returns of probes)
    outside of a trampoline, whatever the filter says.
    """
    allowed = [*jail._CALLS[platform.machine()][1].values(), 335, 336]
    code = f"""
import ctypes
call = ctypes.CDLL(None, use_errno=True).syscall
call.restype = ctypes.c_long
def refused(number):
    ctypes.set_errno(0)
    return call(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
wrong = [n for n in range(700) if n not in {allowed} and not refused(n)]
x32 = [n for n in range(700) if not refused(0x40000000 | n)]
"""
    outcome = run(code, ["wrong", "x32"], Limits(seconds=30))
    assert (outcome.values, outcome.error) == ([[], []], "")


@pytest.mark.skipif(os.geteuid() != 0, reason="who runs the tests has nothing to give up")
def test_root_is_nobody_inside(variant: str) -> None:
    """Some of what root may do stands in the arguments of calls that remain: madvise ruins pages of the
    machine's memory for good, mmap locks more of it than is allowed, which does no harm to try."""
    code = """
import ctypes
mmap = ctypes.CDLL(None, use_errno=True).mmap
mmap.restype = ctypes.c_void_p
def lock(size):
    return mmap(None, ctypes.c_size_t(size), 3, 0x2022, -1, 0) != ctypes.c_void_p(-1).value
"""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, before[1]))
    try:
        assert run(code, ["lock(2**12)", "lock(2**24)"]).values == [True, False]
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


def test_who_has_nothing_to_give_up_need_not_be_able_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that may not touch capabilities has none; with some left no code is run."""
    call = "libc.capset(header, bytes(24))"
    assert call in SOURCE
    changed = VARIANTS["without namespaces"](SOURCE).replace(call, "-1")
    (tmp_path / "jail.py").write_text(changed)
    monkeypatch.setattr(jail, "__file__", str(tmp_path / "jail.py"))
    sandbox.check.cache_clear()
    if os.geteuid() == 0:
        with pytest.raises(SandboxError, match="the kernel keeps the capabilities"):
            run("", ["1"])
        (tmp_path / "jail.py").write_text(VARIANTS["as nobody"](changed))
    assert run("", ["1"]).values == [1]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_the_other_door_of_the_kernel_is_shut(variant: str) -> None:
    """int 0x80 takes system calls by the numbers of 32-bit programs; it ends the process."""
    code = """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, ctypes.c_size_t(4096), 7, 0x22, -1, 0)
def call(machine):
    ctypes.memmove(page, machine, len(machine))
    return ctypes.CFUNCTYPE(ctypes.c_long)(page)()
works = call(bytes.fromhex('b82a000000c3'))  # mov eax, 42; ret
"""
    assert run(code, ["works"]).values == [42]
    getpid = "call(bytes.fromhex('b814000000cd80c3'))"  # mov eax, 20; int 0x80; ret
    assert run(code, [getpid]).error == "ended without an answer"


def test_the_network_is_out_of_reach(variant: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
made = libc.socket(2, 1, 0), ctypes.get_errno()
address = b'\\x02\\x00' + ({port}).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)
reached = [fd for fd in range(3, 64) if libc.connect(fd, address, 16) == 0]
"""
        assert run(code, ["made", "reached"]).values == [[-1, 1], []]
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_crash_leaves_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cores are piped to a program, as many distributions have it, a limit of 0 does not stop it."""
    asked = SOURCE.replace(
        "    code = _filter()\n", "    assert libc.prctl(3) == 0\n    code = _filter()\n"
    )
    assert asked != SOURCE
    (tmp_path / "jail.py").write_text(asked)
    monkeypatch.setattr(jail, "__file__", str(tmp_path / "jail.py"))
    assert run("", ["1"]).values == [1]


def test_inherited_files_are_out_of_reach(tmp_path: Path) -> None:
    secret = tmp_path / "open"
    secret.write_text("hunter2")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        code = "import os\ndef read(n):\n    try: return os.read(n, 9).decode()\n    except OSError: return 'no'"
        assert run(code, [f"[read(n) for n in range(3, {file.fileno() + 20})]"]).values == [
            ["no"] * (file.fileno() + 17)
        ]


@pytest.mark.parametrize(
    "written",
    ['{"values": [1, 2], "error": ""}', '{"values": [], "error": ""}', '{"values": 1}', "[" * 20_000,
     "confined", '{"unconfined": "x"}', "1" * 9999, "nan", '{"values": [NaN, NaN], "error": 3}'],
)  # fmt: skip
def test_a_forged_reply_is_no_more_than_a_wrong_one(written: str) -> None:
    code = f"import os\nos.write(1, b'\\n' + {written.encode()!r} + b'\\n')\nos._exit(0)"
    outcome = run(code, ["2"])
    assert (outcome.values, outcome.error) == ([], "ended without an answer")
    # Right values can be written as they can be computed: whoever knows them has the answer.
    forged = 'import os\nos.write(1, b\'\\n{"values": [7], "error": ""}\\n\')\nos._exit(0)'
    assert run(forged, ["2"]).values == [7]


def test_where_code_cannot_be_confined_none_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = tmp_path / "ran"
    for change in (("_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38", "_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 9999"),
                   ("= 38, 22, 2", "= 38, 22, 77"), ("import ctypes", "import nosuchmodule")):  # fmt: skip
        (tmp_path / "jail.py").write_text(SOURCE.replace(*change))
        assert SOURCE.replace(*change) != SOURCE
        monkeypatch.setattr(jail, "__file__", str(tmp_path / "jail.py"))
        sandbox.check.cache_clear()
        with pytest.raises(
            SandboxError, match=r"foreign code cannot be confined here: .*; remedy: Linux"
        ):
            run(f"open({str(marked)!r}, 'w')", ["1"])
    monkeypatch.setattr(jail, "missing", lambda: "darwin has no seccomp")
    with pytest.raises(SandboxError, match="here: darwin has no seccomp; remedy"):
        run("1")
    monkeypatch.undo()
    sandbox.check.cache_clear()
    assert run("", ["1"]).values == [1]
    assert not marked.exists()


def test_nothing_is_left_behind() -> None:
    run("while True: pass", ["1"], Limits(seconds=0.4))
    listed = ["ps", "-o", "args", "--ppid", str(os.getpid())]
    assert (
        "jail.py" not in subprocess.run(listed, capture_output=True, text=True, check=False).stdout
    )


def _state(pid: int) -> str:
    """The line of a process's seccomp mode, "dead" for one that is gone or waits to be collected."""
    try:
        told = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "dead"
    if "State:\tZ" in told:
        return "dead"
    return next(line for line in told.split("\n") if line.startswith("Seccomp:"))


def _until(what: Callable[[], object]) -> bool:
    """Whether something comes true within 20 seconds."""
    end = time.monotonic() + 20
    while not (found := bool(what())) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_it_ends_with_who_runs_it() -> None:
    asks = (
        "from herdling.tasks.sandbox import Limits, check, run\ncheck()\nprint(flush=True)\n"
        "run('import time; time.sleep(1000)', ['1'], Limits(seconds=1000))"
    )
    with subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        children: list[str] = []

        def started() -> bool:
            listed = ["ps", "-o", "pid=", "--ppid", str(parent.pid)]
            said = subprocess.run(listed, capture_output=True, text=True, check=False).stdout
            children[:] = said.split()
            return any(_state(int(pid)) == "Seccomp:\t2" for pid in children)

        assert _until(started)
        parent.kill()
    (child,) = map(int, children)
    try:
        assert _until(lambda: _state(child) == "dead")
    finally:
        if _state(child) != "dead":
            os.kill(child, 9)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="memory at least 64 MB"):
        Limits(memory=10)
    assert Outcome().values == []
