"""python -m pytest tests/train/test_loop.py"""

import gc
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from herdling import metrics
from herdling.errors import CheckpointError, ConfigError, DataError
from herdling.optim import adamw
from herdling.optim.schedule import Schedule
from herdling.train import loop, rng
from herdling.train.guard import NotFinite
from herdling.train.loop import Every, fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.signals import Stopped
from herdling.train.state import State

SCRIPT = Path(__file__).with_name("toy_run.py")
ROOT = str(Path(loop.__file__).parents[2])


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(out / "metrics.jsonl") if "loss" in line]


def script(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    command = [sys.executable, "-W", "error", str(SCRIPT), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_plain_loop_gives_the_same_weights(toy, tmp_path):
    """Two steps against torch alone: mean over all target tokens, clip, AdamW, schedule."""
    trained, _ = toy.run(tmp_path / "run", steps=2, balance=0.0, hooks=[], noise=0.0)
    model = toy.model()
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(
        adamw.groups_of(model, adamw.AdamWConfig(learning_rate=1e-2)), betas=(0.9, 0.95)
    )
    stream, schedule = iter(toy.Batches(noise=0.0)), Schedule(warmup=2)
    for step in range(2):
        nll, targets = torch.zeros(()), 0
        for batch in (next(stream), next(stream)):
            logits = model(
                batch["input_ids"], documents=batch["documents"], positions=batch["positions"]
            )
            nll = nll + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
            )
            targets += int((batch["labels"] != -100).sum())
        optimizer.zero_grad()
        (nll / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule(step, 2)
        optimizer.step()
        assert losses(tmp_path / "run")[step] == pytest.approx((nll / targets).item(), abs=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


def test_it_learns_and_says_how(toy, tmp_path):
    toy.run(tmp_path, steps=60)
    curve = losses(tmp_path)
    assert curve[0] == pytest.approx(np.log(toy.VOCABULARY), abs=0.15)
    assert curve[-1] < 0.5 * curve[0]
    last = [line for line in metrics.read(tmp_path / "metrics.jsonl") if "loss" in line][-1]
    assert last["tokens"] == 60 * 2 * 4 * 16
    assert len(last["max_violation"]) == 2
    timing = metrics.read(tmp_path / "timing.jsonl")
    assert len(timing) == 60
    assert all(line["tokens_per_second"] > 0 for line in timing)


def test_the_model_and_optimizer_are_left_as_they_came(toy, tmp_path):
    model, _ = toy.run(tmp_path, steps=2, precision="bf16")
    assert "forward" not in vars(model)  # accelerate's wrapper is gone
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32
    logits = model(torch.zeros(1, 3, dtype=torch.int64))
    assert logits.dtype == torch.float32
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bf16_learns_too(toy, tmp_path):
    toy.run(tmp_path, steps=40, precision="bf16")
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_equals_never_stopping(toy, tmp_path, precision):
    """Saved mid-epoch at an odd step, in a fresh process state; all bytes compared."""
    from accelerate.state import AcceleratorState

    toy.run(tmp_path / "whole", steps=7, precision=precision)

    class Enough(Exception):
        pass

    def leave(state):
        if state.step == 3:
            raise Enough

    def evaluate(state):
        state.metrics.log(state.step, drawn=[torch.rand(()).item(), random.random()])

    with pytest.raises(Enough):
        toy.run(
            tmp_path / "cut", steps=7, every=3, precision=precision,
            hooks=[Every(3, evaluate), Every(1, leave)],
        )  # fmt: skip
    AcceleratorState._reset_state(True)
    rng.seed(99)
    _, state = toy.run(tmp_path / "cut", steps=7, resume=True, precision=precision)
    assert state.step == 7
    assert toy.result(tmp_path / "cut", 7) == toy.result(tmp_path / "whole", 7)


def test_killed_at_random_and_resumed_equals_never_killed(tmp_path):
    """SIGKILL at random moments until the run gets through, three times over."""
    done = script(str(tmp_path), "--kills", "random", "--steps", "8")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "hardly killed: nothing was tested"


@pytest.mark.slow
def test_killed_at_every_call_that_touches_a_file(tmp_path):
    """SIGKILL before each write, sync, rename and delete of a run of three steps."""
    done = script(str(tmp_path), "--kills", "each", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 30, "too few points: are the calls still counted?"
    left = [p for p in tmp_path.glob("at-*/checkpoints/.*")]
    assert not left, "a resumed run leaves no half-written folder behind"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_finishes_the_step_saves_and_resumes_exactly(toy, tmp_path, number, status):
    toy.run(tmp_path / "whole", steps=7)
    before = signal.getsignal(number)

    def interrupt(batch):
        # In the middle of the micro-batches of step 4.
        if interrupt.calls == 6:
            os.kill(os.getpid(), number)
        interrupt.calls += 1

    interrupt.calls = 0

    def loss(model, batch):
        interrupt(batch)
        return next_token(model, batch)

    with pytest.raises(Stopped, match=r"stopped after step 4, saved in .*step-00000004") as caught:
        toy.run(tmp_path / "cut", steps=7, every=100, loss=loss)
    assert caught.value.status == status
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000004"]
    toy.run(tmp_path / "cut", steps=7, resume=True)
    assert toy.result(tmp_path / "cut", 7) == toy.result(tmp_path / "whole", 7)


def test_a_second_ctrl_c_stops_at_once(toy, tmp_path):
    def loss(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return next_token(model, batch)

    with pytest.raises(KeyboardInterrupt) as caught:
        toy.run(tmp_path, loss=loss)
    assert not isinstance(caught.value, Stopped)


def test_it_runs_outside_the_main_thread(toy, tmp_path):
    thread = threading.Thread(target=toy.run, args=(tmp_path,), kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert len(losses(tmp_path)) == 2


def test_hooks_run_when_due_after_the_save(toy, tmp_path):
    seen: list[tuple[int, bool]] = []

    def look(state):
        seen.append((state.step, state.checkpoints.path(state.step).is_dir()))

    toy.run(
        tmp_path, steps=7, every=2, keep=9, hooks=[Every(4, look), Every(3, look, at_end=False)]
    )
    assert seen == [(3, False), (4, True), (6, True), (7, True)]


def test_the_split_into_micro_batches_does_not_matter(toy, tmp_path):
    """1 x 8 equals 8 x 1 (and 2 x 4), with rows of very different numbers of targets."""
    shapes = {"1x8": (8, 1, 1), "2x4": (8, 2, 2), "8x1": (8, 8, 8)}
    weights = {}
    for name, (rows, split, accumulation) in shapes.items():
        model, _ = toy.run(
            tmp_path / name, steps=6, rows=rows, split=split, accumulation=accumulation,
            noise=0.0, balance=0.5, hooks=[],
        )  # fmt: skip
        weights[name] = model.state_dict()
        torch.testing.assert_close(
            losses(tmp_path / name), losses(tmp_path / "1x8"), atol=1e-5, rtol=0
        )
    for name, whole in weights["1x8"].items():
        for other in ("2x4", "8x1"):
            torch.testing.assert_close(weights[other][name], whole, atol=2e-4, rtol=0)


def launch(*args: str) -> None:
    """The script on two processes. accelerate has no launcher for several CPU processes without MPI;
    its GPU one starts them as well, and they find the CPU and gloo by themselves."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
               "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", str(SCRIPT), *args]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_follow_the_path_of_one(toy, tmp_path):
    """The same global batch on one process and, under `accelerate launch`, on two."""
    assert script(str(tmp_path / "one"), "--noise", "0").returncode == 0
    launch(str(tmp_path / "two"), "--noise", "0", "--split", "2")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    torch.testing.assert_close(two, one, atol=2e-5, rtol=0)
    state = (tmp_path / "two/checkpoints/step-00000008/state.json").read_text()
    assert '"processes": 2' in state


@pytest.mark.slow
def test_an_adapter_learns_the_same_on_two_processes(toy, tmp_path):
    """The same global batch; some experts have tokens on one of the two alone."""
    from safetensors.torch import load_file

    args = ["--noise", "0", "--adapter", "r=2,targets=all+router"]
    assert script(str(tmp_path / "one"), *args).returncode == 0
    launch(str(tmp_path / "two"), *args, "--split", "2")
    one, two = (load_file(tmp_path / name / "checkpoints/step-00000008/model.safetensors") for name in ("one", "two"))  # fmt: skip
    assert one.keys() == two.keys()
    before = toy.model().state_dict()
    moved = 0
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)
        if name in before:
            assert torch.equal(weight, before[name]), name
        else:
            moved += bool(weight.abs().max() > 1e-2)
    assert moved > 10


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_exactly(toy, tmp_path):
    """Only one of them hears the signal. Labels are dropped at random, by each for itself."""
    launch(str(tmp_path / "whole"), "--split", "2")
    launch(str(tmp_path / "cut"), "--split", "2", "--stop-at", "3")
    assert (tmp_path / "cut/checkpoints/step-00000003").is_dir()
    launch(str(tmp_path / "cut"), "--split", "2", "--resume")
    assert toy.result(tmp_path / "cut", 8) == toy.result(tmp_path / "whole", 8)


@pytest.mark.slow
def test_coded_gradients_learn_and_resume_exactly(toy, tmp_path):
    """4 bits with error feedback between two processes; what is owed is part of the checkpoint."""
    launch(str(tmp_path / "whole"), "--split", "2", "--compression", "4")
    launch(str(tmp_path / "cut"), "--split", "2", "--compression", "4", "--stop-at", "3")
    launch(str(tmp_path / "cut"), "--split", "2", "--compression", "4", "--resume")
    assert toy.result(tmp_path / "cut", 8) == toy.result(tmp_path / "whole", 8)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.3


@pytest.mark.parametrize("setting", [{"rows": 2}, {"accumulation": 1}])
def test_resuming_with_another_batch_is_refused(toy, tmp_path, setting):
    toy.run(tmp_path, steps=2)
    name = next(iter(setting))
    with pytest.raises(ConfigError, match=rf"{name} is {setting[name]} but .* was trained with"):
        toy.run(tmp_path, steps=4, resume=True, **setting)


def test_a_folder_that_holds_a_run_is_not_overwritten(toy, tmp_path):
    toy.run(tmp_path, steps=2)
    with pytest.raises(ConfigError, match="already holds a run; remedy: --resume"):
        toy.run(tmp_path, steps=2)


def test_resuming_a_finished_run_changes_nothing(toy, tmp_path):
    toy.run(tmp_path, steps=4)
    before = toy.result(tmp_path, 4)
    model, state = toy.run(tmp_path, steps=4, resume=True)
    assert toy.result(tmp_path, 4) == before
    assert state.step == 4
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoints/step-00000004/model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def test_shortened_metrics_are_noticed(toy, tmp_path):
    toy.run(tmp_path, steps=4)
    os.truncate(tmp_path / "metrics.jsonl", 10)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: has 10 bytes"):
        toy.run(tmp_path, steps=6, resume=True)


def test_batches_that_end_and_batches_without_a_target_are_errors(toy, tmp_path):
    class Short(toy.Batches):
        def __iter__(self):
            yield from (batch for batch, _ in zip(super().__iter__(), range(3), strict=False))

    with pytest.raises(DataError, match="the batches ended at step 1 of 8"):
        toy.run(tmp_path / "short", batches=Short())
    with pytest.raises(DataError, match="step 1: no token of the whole batch is to be learnt"):
        toy.run(tmp_path / "masked", batches=toy.Batches(noise=1.0))


def test_a_loss_may_name_numbers_of_its_own(toy, tmp_path):
    def loss(model, batch):
        value, _ = next_token(model, batch)
        even = batch["labels"] % 2 == 0
        return value, {"half": value / 2, "even": (even.sum() * 3.0, even.sum())}

    toy.run(tmp_path, steps=1, loss=loss)
    line = metrics.read(tmp_path / "metrics.jsonl")[0]
    assert line["half"] == pytest.approx(line["loss"] / 2)
    assert line["even"] == pytest.approx(3.0)


def test_a_model_without_routers_trains(tmp_path):
    class Points:
        def __iter__(self):
            while True:
                yield {"x": torch.tensor([[1.0], [2.0]])}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            assert state == {}

    model = torch.nn.Linear(1, 1)
    fit(
        model,
        adamw.build(model, adamw.AdamWConfig(learning_rate=0.1, weight_decay=0.0)),
        Points(),
        lambda model, batch: ((model(batch["x"]) - 3 * batch["x"]).square().sum(), {}),
        schedule=Schedule("constant", warmup=0),
        steps=100,
        accelerator=make_accelerator(cpu=True),
        state=State(tmp_path, show=False),
        weight=lambda batch: len(batch["x"]),
    )
    assert losses(tmp_path)[-1] < 1e-2
    assert metrics.read(tmp_path / "metrics.jsonl")[0].keys() == {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
    }


def test_memory_is_flat_over_200_steps(toy, tmp_path):
    tensors, peak = {}, {}

    def measure(state):
        gc.collect()
        tensors[state.step] = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        peak[state.step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    toy.run(tmp_path, steps=250, every=25, window=10, hooks=[Every(50, measure)])
    assert tensors[250] <= tensors[50], tensors
    assert peak[250] - peak[50] < 4096, f"peak memory grew (KiB): {peak}"


def test_not_finite_stops_before_the_weights_change(toy, tmp_path):
    def loss(model, batch):
        value, numbers = next_token(model, batch)
        calls.append(1)
        return (value * float("nan") if len(calls) > 5 else value), numbers

    calls: list[int] = []
    with pytest.raises(NotFinite) as caught:
        toy.run(tmp_path, loss=loss, every=1)
    message = str(caught.value)
    assert re.match(r"step 3: loss nan, .*first not finite: loss, micro-batch 0;", message), message
    assert "not-finite-step-3" in message
    assert "step-00000002" in message
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "not-finite-step-3/micro-0.safetensors")
    stream = iter(toy.Batches(noise=0.0))
    for _ in range(5):
        batch = next(stream)
    assert torch.equal(kept["input_ids"], batch["input_ids"])
    assert (tmp_path / "not-finite-step-3/micro-1.safetensors").exists()
    assert losses(tmp_path) == losses(tmp_path)[:2]


def test_progress_shows_loss_rate_and_expert_load(toy, tmp_path, capsys):
    toy.run(tmp_path, steps=2, show=True)
    lines = capsys.readouterr().err.splitlines()
    pattern = r"toy 1/2  loss \d\.\d{4}  \S+ tok/s  load \d\.\dx \S{4} \S{4}  eta \d:\d\d"
    assert re.fullmatch(pattern, lines[0]), lines
    assert lines[-1].startswith("toy 2/2")
    toy.run(tmp_path, steps=2, resume=True, show=True)
    assert "resumed at step 2 from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cuda", "cpu", "expected"),
    [(False, False, True), (False, True, True), (True, False, False), (True, True, True)],
)
def test_the_device_is_cuda_or_the_cpu(monkeypatch, cuda, cpu, expected):
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(loop, "Accelerator", lambda **settings: given.update(settings))
    make_accelerator(cpu=cpu)
    assert given["cpu"] is expected
