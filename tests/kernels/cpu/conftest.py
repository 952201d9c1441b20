"""Every variant that this machine can run; tests that need a compiler say so where there is none."""

import ctypes
from pathlib import Path

import pytest

from herdling.kernels.cpu import build, library


def runnable() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["native", "plain", *(["avx2"] if build.X86 and " avx2 " in flags else [])]


@pytest.fixture(params=runnable())
def native(request, monkeypatch) -> ctypes.CDLL:
    """The library in use, each variant in turn."""
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler")
    loaded = library.load(request.param)
    monkeypatch.setattr(library, "loaded", lambda: loaded)
    return loaded
