"""Training and prefill speed against transformers, all contenders timed in turn in one run.

    python benchmarks/model_speed.py [--dtype float32 bfloat16] [--tests train prefill] [--huge-pages]

Contenders on one random model (145.8 M parameters, 51.5 M active): `stock` transformers, which runs
every expert for every token; `sparse`, transformers with its MoE layer patched to run only chosen
experts (the fair opponent); `accelerated`, transformers after `herdling.accelerate_transformers`;
`herdling`. Each runs in a process of its own, all alive at once; each round times all of them once,
one after the other; the figures are medians over rounds. The roofline is
FLOPs of the active matrices over the GEMM rate measured in the same run.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import herdling
from herdling.kernels.cross_entropy import weighted_nll
from herdling.model.cache import Cache
from herdling.model.config import ModelConfig
from herdling.model.llama import build

SHAPE = dict(vocab_size=32768, hidden_size=512, intermediate_size=512, intermediate_size_mlp=1024,
             num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
             num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1,
             max_position_embeddings=16384, initializer_range=0.04, bos_token_id=None,
             eos_token_id=None, pad_token_id=None,
             rope_parameters={"rope_type": "default", "rope_theta": 500000.0})  # fmt: skip


ACTIVE = 34_677_248
"""Matrix weights a token meets, without the embedding look-up."""
TARGETS = {
    ("train", "float32"): {"stock": 4.5, "sparse": 1.1},
    ("train", "bfloat16"): {"stock": 3.5, "sparse": 1.4},
    ("prefill", "float32"): {"stock": 3.5},
    ("prefill", "bfloat16"): {"stock": 2.7},
}
"""How many times faster than whom `herdling` must be on a CPU; the exit status says whether it is."""
HUGE_PAGES = ("herdling", "accelerated")


def sparse_moe(self: Llama4TextMoe, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-1 MoE that visits chosen experts only; weights are unbound once (see docs/performance.md)."""
    x = hidden.reshape(-1, self.hidden_dim)
    logits = F.linear(x, self.router.weight)
    best, expert = logits.max(-1)
    scaled = x * best.float().sigmoid().to(x.dtype)[:, None]
    out = self.shared_expert(x)
    gate_up, down = self.experts.gate_up_proj.unbind(0), self.experts.down_proj.unbind(0)
    for e in expert.unique().tolist():
        rows = (expert == e).nonzero()[:, 0]
        gate, up = (scaled[rows] @ gate_up[e]).chunk(2, -1)
        out = out.index_add(0, rows, (F.silu(gate) * up) @ down[e])
    return out, logits


def patch_sparse(model: Llama4ForCausalLM) -> Llama4ForCausalLM:
    for module in model.modules():
        if isinstance(module, Llama4TextMoe):
            module.forward = sparse_moe.__get__(module)
    return model


def transformers_step(model: Llama4ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def herdling_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    labels = F.pad(ids[:, 1:], (0, 1))
    weights = torch.full(
        labels.shape, 1 / (labels.shape[0] * (labels.shape[1] - 1)), device=ids.device
    )
    weights[:, -1] = 0
    return model(ids, readout=lambda h, head: weighted_nll(h, head, labels, weights))


def train(model: torch.nn.Module, loss: Callable, ids: torch.Tensor) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers_prefill(model: Llama4ForCausalLM, ids: torch.Tensor) -> Callable[[], object]:
    model.eval()
    return torch.inference_mode()(lambda: model(ids, use_cache=True, logits_to_keep=1))


def herdling_prefill(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    model.eval()
    config = model.config.text
    last = lambda h, head: head(h[:, -1:])  # noqa: E731
    return torch.inference_mode()(lambda: model(ids, cache=Cache(config), readout=last))


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """Best FLOP/s of a square product in this run."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def prepare(
    name: str, test: str, dtype: torch.dtype, rows: int, length: int, device: str
) -> Callable:
    """The contender's step as a callable without arguments."""
    torch.manual_seed(0)
    ids = torch.randint(0, SHAPE["vocab_size"], (rows, length)).to(device)
    model = Llama4ForCausalLM(Llama4TextConfig(**SHAPE)).to(device, dtype)
    if name == "herdling":
        ours = build(ModelConfig.from_hf(model.config.to_dict()), dtype, device)
        ours.load_state_dict(model.state_dict())
        return train(ours, herdling_step, ids) if test == "train" else herdling_prefill(ours, ids)
    if name == "sparse":
        patch_sparse(model)
    if name == "accelerated":
        herdling.accelerate_transformers(model)
    return (
        train(model, transformers_step, ids)
        if test == "train"
        else transformers_prefill(model, ids)
    )


def worker(pipe, threads: int, *what) -> None:
    """One contender in a process of its own: a message in, a time out."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    device = what[-1]
    run = prepare(*what)
    run()
    pipe.send("ready")
    while pipe.recv() == "go":
        pipe.send(seconds(run, device))


def measure(args: argparse.Namespace, test: str, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of each contender, timed in turn."""
    rows, length = args.shape if test == "train" else (1, args.shape[1])
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in args.contenders:
        # Only Herdling asks torch for huge pages; the others run as their users would run them.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1" if name in HUGE_PAGES or args.huge_pages else "0"
        pipes[name], there = context.Pipe()
        what = (there, args.threads, name, test, dtype, rows, length, args.device)
        process = context.Process(target=worker, args=what, daemon=True)
        process.start()
        processes.append(process)
        pipes[name].recv()
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(args.rounds):
        for name, pipe in pipes.items():
            pipe.send("go")
            times[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("stop")
        process.join()
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tests", nargs="+", default=["train", "prefill"])
    parser.add_argument(
        "--contenders", nargs="+", default=["stock", "sparse", "accelerated", "herdling"]
    )
    parser.add_argument("--shape", type=int, nargs=2, default=[4, 512], metavar=("ROWS", "LENGTH"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--huge-pages", action="store_true", help="for all contenders")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    missed = []
    for dtype_name in args.dtype:
        dtype = getattr(torch, dtype_name)
        for test in args.tests:
            median = measure(args, test, dtype)
            rate = gemm_rate(dtype, args.device)
            tokens = args.shape[1] * (args.shape[0] if test == "train" else 1)
            flops = 6 * ACTIVE * tokens
            if test == "prefill":  # the head runs for the last token only
                head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
                flops = 2 * (ACTIVE - head) * tokens + 2 * head
            for name, t in median.items():
                line = {
                    "test": test,
                    "dtype": dtype_name,
                    "contender": name,
                    "tok_s": round(tokens / t, 1),
                    "herdling_is_faster_by": round(t / median["herdling"], 2),
                    "of_roofline": round(flops / rate / t, 3),
                    "gemm_gflops": round(rate / 1e9),
                }
                print(json.dumps(line), flush=True)
                wanted = TARGETS.get((test, dtype_name), {}).get(name, 0)
                if args.device == "cpu" and line["herdling_is_faster_by"] < wanted:
                    missed.append(f"{test} {dtype_name} against {name}: below {wanted}")
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
