"""A whole tiny run, for the tests beside it: as functions, and as a script that is killed and resumed.

python tests/train/toy_run.py OUT [--resume] [--steps N] [--accumulation N] [--rows N]
python tests/train/toy_run.py OUT --kills random|each     run in children that are killed
"""

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from herdling import distributed, lora
from herdling.model import init, llama
from herdling.model.config import preset
from herdling.optim import adamw
from herdling.optim.schedule import Schedule
from herdling.train import rng
from herdling.train.compression import Compression
from herdling.train.health import Routing, RoutingConfig
from herdling.train.loop import Every, fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.signals import Stopped
from herdling.train.state import CheckpointConfig, State

VOCABULARY = 32


def model(seed: int = 0) -> llama.TextLM:
    config = preset(
        "nano",
        vision=False,
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.manual_seed(seed)
    built = llama.build(config)
    init.initialize(built)
    assert isinstance(built, llama.TextLM)
    return built


class Batches:
    """Counting sequences, five micro-batches an epoch, shuffled anew each epoch.

    With `noise`, labels are dropped at random by torch's global generator, so that a run which does
    not restore it cannot end the same. Several processes take rows of the same batches in turn.
    """

    PER_EPOCH = 5

    def __init__(self, rows: int = 4, length: int = 16, noise: float = 0.2, split: int = 1) -> None:
        self.rows, self.length, self.noise, self.split = rows, length, noise, split
        self.epoch = self.index = 0

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.index = state["epoch"], state["index"]

    def __iter__(self):
        while True:
            order = torch.randperm(
                self.PER_EPOCH * self.rows, generator=torch.Generator().manual_seed(self.epoch)
            )
            at = self.index * self.rows
            mine = order[at : at + self.rows].view(self.split, -1)
            epoch = self.epoch
            self.index += 1
            if self.index == self.PER_EPOCH:
                self.epoch, self.index = self.epoch + 1, 0
            share = distributed.world_size()
            for part in mine[distributed.rank() :: share] if share > 1 else mine:
                yield self.batch(part + 1000 * epoch)

    def batch(self, seeds: torch.Tensor) -> dict[str, torch.Tensor]:
        start, stride = seeds[:, None], 1 + seeds[:, None] % 3
        ids = (start + stride * torch.arange(self.length + 1)) % VOCABULARY
        labels = ids[:, 1:].clone()
        if self.noise:
            labels[torch.rand(labels.shape) < self.noise] = -100
        else:  # rows of very different numbers of targets
            labels[:, self.length // 2 :][seeds % 2 == 0] = -100
        at = torch.arange(self.length).expand_as(labels)
        return {
            "input_ids": ids[:, :-1].contiguous(),
            "labels": labels,
            "positions": at.contiguous(),
            "documents": torch.zeros_like(labels),
        }


def run(
    out: Path,
    *,
    steps: int = 8,
    resume: bool = False,
    accumulation: int = 2,
    rows: int = 4,
    noise: float = 0.2,
    split: int = 1,
    every: int = 2,
    keep: int = 2,
    permanent: int = 0,
    balance: float = 0.05,
    window: int = 3,
    precision: str = "fp32",
    loss_scale=None,
    compression=None,
    state_bits: int = 32,
    adapter: str | None = None,
    hooks: list[Every] | None = None,
    batches=None,
    loss=next_token,
    show: bool = False,
) -> tuple[llama.TextLM, State]:
    lm = model()
    rng.seed(1)

    def evaluate(state: State) -> None:
        # Draws from the global generators, as sampling would.
        state.metrics.log(state.step, drawn=[torch.rand(()).item(), random.random()])

    state = State(
        out,
        resume=resume,
        config=CheckpointConfig(every, keep, permanent),
        identity={"rows": rows},
        title="toy",
        show=show,
    )
    if adapter is not None:
        lora.attach(lm, lora.LoraConfig.parse(adapter))
    optimizer = adamw.build(lm, adamw.AdamWConfig(learning_rate=1e-2, state_bits=state_bits))
    if adapter is not None:
        lora.spare_idle_experts(optimizer, lm)
    fit(
        lm,
        optimizer,
        batches or Batches(rows, noise=noise, split=split),
        loss,
        schedule=Schedule(warmup=2),
        steps=steps,
        hooks=[Every(3, evaluate)] if hooks is None else hooks,
        accelerator=make_accelerator(precision, accumulation, cpu=True),
        state=state,
        routing=Routing(lm, RoutingConfig(balance, window)),
        loss_scale=loss_scale,
        compression=compression,
    )
    return lm, state


def result(out: Path, steps: int) -> dict[str, bytes]:
    """The files that must be the same, byte for byte."""
    last = out / f"checkpoints/step-{steps:08d}"
    files = [p for p in last.iterdir() if p.is_file()]
    return {p.name: p.read_bytes() for p in [*files, out / "metrics.jsonl"]}


def _child(out: Path, steps: int, kill_at: int | None) -> int:
    """Run in a forked process; with `kill_at`, SIGKILL it before its n-th call that touches a file."""
    pid = os.fork()
    if pid:
        return pid
    if kill_at is not None:
        calls = iter(range(1, 10**9))

        def counted(real):
            def call(*args, **kwargs):
                if next(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in (
            "write",
            "fsync",
            "rename",
            "replace",
            "ftruncate",
            "rmdir",
            "unlink",
            "mkdir",
        ):
            setattr(os, name, counted(getattr(os, name)))
    run(out, steps=steps, resume=True, every=1, keep=1)
    os._exit(0)


def killed_at_random(out: Path, steps: int, seed: int) -> int:
    """Kill and resume until the run ends by itself; return how often it was killed."""
    draw, kills, longest = random.Random(seed), 0, 0.15
    while True:
        pid = _child(out, steps, None)
        time.sleep(draw.uniform(0.0, longest))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
            return kills
        kills += 1
        longest *= 1.1  # so that on any machine one attempt gets through at last


def killed_at_each_call(out: Path, steps: int, expected: dict[str, bytes]) -> int:
    """For every call that touches a file: kill there, resume, compare. Return how many there were."""
    for n in range(1, 10**9):
        folder = out / f"at-{n}"
        _, status = os.waitpid(_child(folder, steps, n), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the run failed by itself"
            return n - 1
        assert os.WTERMSIG(status) == signal.SIGKILL
        _, status = os.waitpid(_child(folder, steps, None), 0)
        assert status == 0, f"resuming failed after a kill at call {n}"
        assert result(folder, steps) == expected, f"another result after a kill at call {n}"
    raise AssertionError


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--compression", type=int, help="bits, negative: without error feedback")
    parser.add_argument("--adapter", help="such as r=2,targets=all")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-at", type=int, help="SIGTERM to the main process after this step")
    parser.add_argument("--kills", choices=["random", "each"])
    args = vars(parser.parse_args())
    kills, out, stop_at = (args.pop(name) for name in ("kills", "out", "stop_at"))

    if args["compression"] is not None:
        bits = args["compression"]
        args["compression"] = Compression(abs(bits), feedback=bits > 0)

    def stop(state: State) -> None:
        if state.step == stop_at and distributed.is_main():
            os.kill(os.getpid(), signal.SIGTERM)

    if stop_at is not None:
        try:
            run(out, hooks=[Every(1, stop)], **args)
        except Stopped:
            sys.exit()
        raise AssertionError("the run was not stopped")
    if kills is None:
        run(out, **args)
        sys.exit()
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    steps = args["steps"]
    run(out / "whole", steps=steps, every=1, keep=1)  # here, so that children find all imported
    expected = result(out / "whole", steps)
    if kills == "random":
        count = 0
        for seed in range(3):
            count += killed_at_random(out / f"killed-{seed}", steps, seed)
            assert result(out / f"killed-{seed}", steps) == expected, f"another result, seed {seed}"
    else:
        count = killed_at_each_call(out, steps, expected)
    print(count)
