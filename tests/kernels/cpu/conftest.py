"""Every variant that this machine can run; tests that need a compiler say so where there is none."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from herdling.kernels.cpu import build, library


def runnable() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["native", "plain", *(["avx2"] if build.X86 and " avx2 " in flags else [])]


@pytest.fixture(params=runnable())
def native(request, monkeypatch) -> Iterator[ctypes.CDLL]:
    """The library in use, each variant in turn."""
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("HERDLING_NATIVE", request.param)
    library.loaded.cache_clear()
    yield library.load(request.param)
    assert library.loaded() is library.load(request.param)  # what the test used
    library.loaded.cache_clear()
