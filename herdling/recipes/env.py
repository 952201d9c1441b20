"""`herdling env`: what a bug report should say about the machine.

herdling env [--json FILE]
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import herdling
from herdling.files import check_file, write_json

LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "huggingface_hub",
             "numpy", "tyro")  # fmt: skip
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd",
         "i8mm", "bf16", "sve")  # fmt: skip
"""The processor features that decide which fast code runs."""


@dataclass(frozen=True)
class Config:
    """Print versions and hardware for a bug report."""

    json: Path | None = None
    """Also write the report to this file as JSON."""


def main(config: Config) -> int:
    check_file(config.json, "json")
    report = collect()
    for name, value in report.items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}")
    if config.json is not None:
        write_json(config.json, report)
    return 0


def collect() -> dict[str, Any]:
    """The report: strings, numbers and lists by name."""
    import torch

    report: dict[str, Any] = {"herdling": herdling.__version__, "python": platform.python_version()}
    report |= {name: _version(name) for name in LIBRARIES}
    report |= {
        "system": platform.platform(),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cpu flags": _flags(),
        "torch cpu code": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set"),
        "memory GiB": _memory(),
        "compiler": _compiler(),
        "gpu": _gpus(),
    }
    return report


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_field(name: str) -> str:
    """The first value of a field of Linux' /proc/cpuinfo, or ''."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _flags() -> list[str]:
    present = (_cpu_field("flags") or _cpu_field("Features")).split()
    return [flag for flag in FLAGS if flag in present] or ["unknown"]


def _memory() -> float | str:
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    if not all(name in getattr(os, "sysconf_names", {}) for name in names):
        return "unknown"
    return round(os.sysconf(names[0]) * os.sysconf(names[1]) / 2**30, 1)


def _compiler() -> str:
    """The first line of the C++ compiler's own version, or 'none found'."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout:
            return done.stdout.splitlines()[0]
    return "none found"


def _gpus() -> list[str]:
    import torch

    if torch.cuda.is_available():
        return [
            f"{p.name} ({p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor})"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    return ["Apple MPS"] if torch.backends.mps.is_available() else ["none"]
