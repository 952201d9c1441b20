"""Compiled once into a private cache, safely by several processes; without a compiler one note and no harm."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from herdling.errors import InputError
from herdling.kernels import cpu
from herdling.kernels.cpu import build, library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "herdling" / "native"


@pytest.fixture
def _fresh():
    for cached in (library.loaded, library.load):
        cached.cache_clear()
    yield
    for cached in (library.loaded, library.load):
        cached.cache_clear()


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Counts its calls and writes a file in no time."""
    script, calls = tmp_path / "fake-c++", tmp_path / "calls"
    calls.write_text("")
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo fake 1; exit 0; }\n'
        f'echo call >> {calls}; sleep 0.2; for a; do out=$a; done; echo library > "$out"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def test_processes_that_ask_at_once_compile_once(cache, fake_compiler):
    code = (
        f"import runpy; print(runpy.run_path({build.__file__!r})['compiled']('plain'))"  # no torch
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {run.communicate()[0].strip() for run in runs}
    assert len(said) == 1
    assert os.path.exists(said.pop())
    assert fake_compiler.read_text().count("call") == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert not [f for f in cache.iterdir() if f.suffix not in (".so", ".lock")]


def test_another_compiler_flag_or_source_is_another_library(
    cache, fake_compiler, monkeypatch, tmp_path
):
    first = build.compiled("plain")
    assert build.compiled("plain") == first
    assert build.compiled("native") != first
    extra = tmp_path / "extra.h"
    extra.write_text("// changed")
    monkeypatch.setattr(build, "HEADERS", [*build.HEADERS, extra])
    assert build.compiled("plain") != first


def test_a_cache_that_others_can_write_is_refused(cache, fake_compiler):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match="others can write"):
        build.compiled("plain")


@pytest.mark.parametrize("left", [b"", b"libr", b"another"])
def test_a_damaged_library_is_compiled_again(left, cache, fake_compiler):
    made = build.compiled("plain")
    whole = made.read_bytes()
    made.write_bytes(left)
    assert build.compiled("plain") == made
    assert made.read_bytes() == whole
    assert fake_compiler.read_text().count("call") == 2


def test_a_compiler_that_fails_without_a_word_is_told_by_its_status(cache, tmp_path, monkeypatch):
    script = tmp_path / "mute"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\nexit 7\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(
        build.BuildError, match=r"mute failed \(exit status 7\): it does not say why"
    ):
        build.compiled("plain")


def test_a_cache_that_cannot_be_written_names_the_remedy(cache, fake_compiler, tmp_path):
    (tmp_path / "herdling").write_text("a file where the folder should be")
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build.compiled("plain")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("broken", ["no-such-compiler", "false", "g++ 'unclosed"])
def test_no_compiler_is_one_note_and_the_torch_path(broken, cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", broken)
    monkeypatch.delenv("HERDLING_NATIVE", raising=False)
    with caplog.at_level(logging.WARNING):
        assert not cpu.available()
        assert not cpu.available()
    assert len(caplog.records) == 1
    assert broken in caplog.text
    assert cpu.features() == "off"
    with pytest.raises(InputError, match="available"):
        cpu.linear(torch.ones(1, 4), torch.ones(4, 4))


@pytest.mark.usefixtures("_fresh")
def test_a_compiler_that_never_answers_is_one_note_too(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("HERDLING_NATIVE", raising=False)

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(build.subprocess, "run", hang)
    assert not cpu.available()
    assert "timed out after 60" in caplog.text


@pytest.mark.usefixtures("_fresh")
def test_an_environment_variable_turns_it_off_without_a_note(monkeypatch, caplog):
    monkeypatch.setenv("HERDLING_NATIVE", "0")
    assert not cpu.available()
    assert not caplog.records


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(build.BuildError, match="plain"):
        build.compiled("avx9000")
