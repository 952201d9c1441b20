"""Makes the toy run importable; importlib mode gives tests no package of their own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).with_name("toy_run.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("toy_run", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state in the process; each test starts and leaves without one."""
    from accelerate.state import AcceleratorState

    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)
