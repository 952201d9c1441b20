"""python -m pytest tests/train/test_state.py (exact resume of whole runs: test_loop.py)"""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from herdling.errors import CheckpointError, ConfigError
from herdling.optim import adamw
from herdling.train import rng
from herdling.train.checkpoints import Checkpoints
from herdling.train.state import CheckpointConfig, State, environment


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(()).item()]  # noqa: NPY002  # fmt: skip


def test_random_generators_come_back():
    rng.seed(5)
    draws()  # leaves half a pair of Gaussians in the first two
    saved = rng.state_dict()
    first = draws()
    assert draws() != first
    rng.load_state_dict(saved)
    assert draws() == first
    rng.seed(5)
    draws()
    assert draws() == first


def test_the_last_few_and_the_permanent_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, permanent=30)
    for step in range(10, 101, 10):
        with checkpoints.write(step) as folder:
            (folder / "weights").write_text(str(step))
    assert checkpoints.steps() == [30, 60, 80, 90, 100]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest / "weights").read_text() == "100"


def test_a_failed_write_leaves_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)

    def write():
        with checkpoints.write(1) as folder:
            (folder / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert checkpoints.latest() is None
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_leftovers_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with checkpoints.write(3):
        pass
    for name in (".step-00000004.abc", ".step-00000001.gone", "notes"):
        (tmp_path / name).mkdir()
    checkpoints.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000003"]
    assert checkpoints.steps() == [3]


def trained(toy, folder):
    toy.run(folder, steps=2, keep=1)
    return folder / "checkpoints/step-00000002"


def resume(toy, folder, model):
    state = State(folder, resume=True, identity={"rows": 4, "accumulation": 2}, show=False)
    optimizer = adamw.build(model, adamw.AdamWConfig())
    state.begin(model, optimizer, {"batches": toy.Batches()})
    return optimizer


def test_a_checkpoint_holds_weights_and_optimizer_by_name(toy, tmp_path):
    folder = trained(toy, tmp_path)
    assert {p.name for p in folder.iterdir()} == {
        "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json", "state.safetensors",
    }  # fmt: skip
    model = toy.model()
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    optimizer = resume(toy, tmp_path, model)
    assert len(optimizer.state) == len(list(model.parameters()))
    averages = load_file(folder / "optimizer.safetensors")
    first = optimizer.state[model.lm_head.weight]
    assert torch.equal(first["exp_avg"], averages["lm_head.weight/exp_avg"])
    assert float(first["step"]) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"model\.norm\.weight is only in the model"),
        (lambda w: w.update(extra=torch.ones(1)), "extra is only in the checkpoint"),
        (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"\(3,\) torch.float32, the model has \(16,\)"),
        (lambda w: w.update({"model.norm.weight": torch.ones(16).half()}), "torch.float16, the model has"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(toy, tmp_path, change, message):
    path = trained(toy, tmp_path) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=message):
        resume(toy, tmp_path, toy.model())


def test_a_truncated_checkpoint_is_named(toy, tmp_path):
    path = trained(toy, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        resume(toy, tmp_path, toy.model())


def test_a_parameter_that_is_trained_no_more_is_named(toy, tmp_path):
    trained(toy, tmp_path)
    model = toy.model()
    model.lm_head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"does not train lm_head\.weight any more"):
        resume(toy, tmp_path, model)


def test_a_changed_machine_is_said(toy, tmp_path):
    folder = trained(toy, tmp_path)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace(f'"{torch.__version__}"', '"2.0.0"'))
    state = State(tmp_path, resume=True, identity={"rows": 4, "accumulation": 2}, show=False)
    model = toy.model()
    lines = state.begin(model, adamw.build(model, adamw.AdamWConfig()), {})
    assert lines[0].startswith("resumed at step 2 from ")
    assert lines[1] == (
        f"results may differ in the last bits: torch was 2.0.0, is {torch.__version__}"
    )


def test_resuming_where_nothing_was_saved_starts_anew_and_says_so(toy, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"st')
    with pytest.raises(ConfigError, match="already holds a run"):
        State(tmp_path)
    state = State(tmp_path, resume=True, show=False)
    model = toy.model()
    lines = state.begin(model, adamw.build(model, adamw.AdamWConfig()), {})
    assert lines == ["no checkpoint yet: starting at step 0"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_bad_settings_are_errors():
    for settings in ({"every": 0}, {"keep": 0}, {"permanent": -1}):
        with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(settings))} is"):
            CheckpointConfig(**settings)


def test_the_device_of_a_run_is_noted_by_its_kind_without_cuda():
    for device in ("cpu", "meta"):
        found = environment(torch.nn.Linear(2, 2, device=device))
        assert found["device"] == device


def test_the_device_of_a_run_is_noted_by_its_name_with_cuda(monkeypatch):
    device = torch.device("cuda", 1)
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    assert environment(model)["device"] == "card of cuda:1"
