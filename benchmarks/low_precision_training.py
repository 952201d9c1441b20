"""Training in few bits on a toy: held-out loss of each way beside float32's, equal steps and seeds.

    python benchmarks/low_precision_training.py formats [--seeds 3] [--steps 500] [--out FILE.jsonl]
    python benchmarks/low_precision_training.py noise | states | gradients | ternary | outlier | table FILE...

A model of Herdling's own of about 0.8 M parameters (2 layers, 4 experts, a byte a token) on the
English of the built-in text, float32 for all that a way does not round. Every run of a seed sees the
same batches from the same weights. `gradients` starts a second process (gloo) and halves the batch.

formats    fp8, fp8_rowwise and MX for weights, activations and gradients, emulated exactly
noise      float32 from weights moved by a millionth, and three times by 2.6 %, which is what E4M3 rounds
           away: what the path of a run alone does
outlier    E4M3 gradients with one scale a tensor, and row by row, beside a gradient 1e4 times the
           largest that belongs to an input of zeros: harmless but for the scale it forces
states     AdamW with 8-bit averages; bytes a parameter
gradients  8 and 4 bits between two processes, with and without error feedback
ternary    experts ternary (BitNet b1.58) from the start, and rounded after float training
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from herdling import distributed
from herdling.data.embedded import documents
from herdling.model import init
from herdling.model.config import preset
from herdling.model.llama import TextLM, build
from herdling.optim import adamw
from herdling.optim.adamw_8bit import state_bytes
from herdling.optim.schedule import Schedule
from herdling.quant import low_precision, qat
from herdling.quant.low_precision import RECIPES, LowLinear, Recipe
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap
from herdling.train.compression import Compression
from herdling.train.losses import next_token

LENGTH, ROWS, HELD_OUT = 64, 16, 64


def text(split: str, size: int) -> Tensor:
    joined = "\n\n".join(d.text for d in documents("english", split))
    return torch.frombuffer(bytearray(joined.encode()[:size]), dtype=torch.uint8).long()


def model_of(seed: int, **fields: Any) -> TextLM:
    small = dict(
        vocab_size=256, hidden_size=128, intermediate_size=128, intermediate_size_mlp=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        attention_chunk_size=48, no_rope_layer_interval=2,
    )  # fmt: skip
    made = init.initialize(build(preset("nano", vision=False, **{**small, **fields})), seed)
    assert isinstance(made, TextLM)
    return made


def batch(data: Tensor, rows: int, draw: torch.Generator) -> dict[str, Tensor]:
    starts = torch.randint(0, len(data) - LENGTH - 1, (rows,), generator=draw)
    ids = torch.stack([data[s : s + LENGTH + 1] for s in starts])
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


@torch.no_grad()
def held_out(model: nn.Module, data: Tensor) -> float:
    """Mean loss in nats a byte on the same rows of the test split."""
    draw = torch.Generator().manual_seed(99)
    total = count = 0.0
    for _ in range(4):
        rows = batch(data, HELD_OUT, draw)
        total += float(next_token(model, rows)[0])
        count += rows["labels"].numel()
    return total / count


def train(
    model: TextLM,
    data: Tensor,
    seed: int,
    steps: int,
    *,
    state_bits: Any = 32,
    rate: float = 3e-3,
    reduce: Callable[[TextLM], None] | None = None,
) -> torch.optim.Optimizer:
    """The loop's step in short: this times nothing and keeps no checkpoints."""
    optimizer = adamw.build(model, adamw.AdamWConfig(learning_rate=rate, state_bits=state_bits))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule, draw = Schedule(warmup=20), torch.Generator().manual_seed(seed)
    world, mine = distributed.world_size(), distributed.rank()
    for step in range(steps):
        rows = batch(data, ROWS, draw)
        rows = {k: v[mine::world] for k, v in rows.items()}
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own * schedule(step, steps)
        loss, _ = next_token(model, rows)
        (loss / rows["labels"].numel()).backward()
        if reduce is not None:
            reduce(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@contextmanager
def planted(model: TextLM) -> Iterator[None]:
    """Beside the rows of every linear one of zeros, whose gradient is 1e4 times the largest."""

    class Plant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out: Tensor) -> Tensor:
            return out[:-1].clone()

        @staticmethod
        def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            extra = torch.zeros_like(grad[:1])
            extra[0, 0] = 1e4 * grad.abs().max()
            return torch.cat([grad, extra])

    plain = LowLinear.forward

    def forward(self: LowLinear, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = plain(self, torch.cat([flat, torch.zeros_like(flat[:1])]))
        return Plant.apply(out).view(*x.shape[:-1], -1)

    LowLinear.forward = forward
    try:
        yield
    finally:
        LowLinear.forward = plain


def outliers() -> dict[str, Recipe]:
    rowwise, e4m3 = RECIPES["fp8_rowwise"], RECIPES["fp8"].inputs
    return {
        "tensor": Recipe("tensor", rowwise.weights, rowwise.inputs, e4m3, True),
        "row": rowwise,
    }


def formats(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    for name in ("fp32", *RECIPES):
        model = model_of(seed)
        if name != "fp32":
            low_precision.apply(model, name)
        train(model, data, seed, steps)
        yield {"way": name, "loss": held_out(model, test)}


def noise(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    for n, size in enumerate((1e-6, 0.026, 0.026, 0.026)):
        model = model_of(seed)
        draw = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + size * torch.randn(p.shape, generator=draw))
        train(model, data, seed, steps)
        yield {"way": f"fp32, moved by {size:g} ({n})", "loss": held_out(model, test)}


def outlier(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    for name, recipe in outliers().items():
        model = model_of(seed)
        low_precision.apply(model, recipe, ("attention", "shared"))
        with planted(model):
            train(model, data, seed, steps)
        yield {"way": f"outlier, {name}", "loss": held_out(model, test)}


def states(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    for bits in (32, 8):
        model = model_of(seed)
        optimizer = train(model, data, seed, steps, state_bits=bits)
        size = state_bytes(optimizer) / sum(p.numel() for p in model.parameters())
        loss = held_out(model, test)
        yield {"way": f"AdamW, {bits}-bit states", "loss": loss, "bytes_a_parameter": size}


def ternary(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    model = model_of(seed)
    train(model, data, seed, steps)
    yield {"way": "fp32 (for ternary)", "loss": held_out(model, test)}
    swap(model, scheme("ternary"))
    yield {"way": "ternary after training", "loss": held_out(model, test)}
    model = model_of(seed)
    qat.prepare(model, replace(scheme("ternary"), activations=scheme("w8a8").activations))
    train(model, data, seed, steps)
    yield {"way": "ternary experts", "loss": held_out(model, test)}


def gradients(seed: int, steps: int, data: Tensor, test: Tensor) -> Iterator[dict[str, Any]]:
    """Both processes come here; the second one's lines are dropped."""
    for name, compression in (
        ("exact", None),
        ("8 bits", Compression(8)),
        ("4 bits", Compression(4)),
        ("4 bits, no feedback", Compression(4, feedback=False)),
    ):
        model = model_of(seed)

        def reduce(model: TextLM, compression: Compression | None = compression) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            if compression is None:
                dist.all_reduce(flat)
                flat /= distributed.world_size()
            else:
                flat = compression.mean(flat, "all")
            for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

        train(model, data, seed, steps, reduce=reduce)
        yield {"way": f"gradients, {name}", "loss": held_out(model, test)}


WORK = {f.__name__: f for f in (formats, noise, outlier, states, gradients, ternary)}


def table(paths: list[Path]) -> str:
    """Means over seeds, and each seed's change from the float32 run of its own kind of work."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    losses: dict[str, dict[int, float]] = {}
    for line in lines:
        losses.setdefault(f"{line['work']}/{line['way']}", {})[line["seed"]] = line["loss"]
    first: dict[str, str] = {}
    out = ["| way | loss | change from the first | by seed |", "| --- | --: | --: | --- |"]
    for name, own in losses.items():
        work, way = name.split("/", 1)
        base = losses[first.setdefault(work, name)]
        changes = [own[s] / base[s] - 1 for s in own if s in base]
        each = ", ".join(f"{c:+.2%}" for c in changes)
        mean = statistics.mean(own.values())
        out.append(f"| {way} | {mean:.4f} | {statistics.mean(changes):+.2%} | {each} |")
    return "\n".join(out)


def run(args: argparse.Namespace, data: Tensor, test: Tensor) -> None:
    for seed in args.seed if args.seed else range(args.seeds):
        started = time.process_time()
        for result in WORK[args.work](seed, args.steps, data, test):
            result |= {"seed": seed, "steps": args.steps, "work": args.work}
            result["cpu_seconds"] = round(time.process_time() - started, 1)
            started = time.process_time()
            if distributed.is_main():
                print(json.dumps(result), flush=True)
                if args.out is not None:
                    with args.out.open("a") as file:
                        file.write(json.dumps(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("work", choices=[*WORK, "table"])
    parser.add_argument("files", type=Path, nargs="*", help="of `table`: what --out wrote")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, nargs="*", help="these seeds only")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.work == "table":
        print(table(args.files))
        return
    meet = os.environ.get("HERDLING_MEET")
    second = None
    if args.work == "gradients" and meet is None:
        meet = tempfile.mkdtemp() + "/meet"
        second = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "HERDLING_MEET": meet})  # fmt: skip
    if args.work == "gradients":
        rank = 0 if second is not None else 1
        dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    run(args, text("train", 2_000_000), text("test", 200_000))
    if second is not None:
        assert second.wait() == 0


if __name__ == "__main__":
    main()
