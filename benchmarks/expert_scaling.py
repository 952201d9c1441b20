"""Is the cost of a token independent of the number of experts? One MoE layer, top-1, 4 to 128 experts.

    python benchmarks/expert_scaling.py [--tokens 1 2048 16384] [--width 256] [--dtype float32]

Every round times each expert count once, in turn; figures are medians, as a ratio to the smallest
count. One token, as in decoding, reads one expert however many there are. A batch reads each expert
once, and training writes each expert's gradient once: that is memory traffic per expert, not per token,
so a batch must be large enough to hide it.
The exit status says whether decoding and the largest batch stay within 15 %.
"""

import argparse
import json
import statistics
import sys
import time

import torch

from herdling.model.config import preset
from herdling.model.llama import MoE

COUNTS = (4, 8, 16, 32, 64, 128)


def make(experts: int, width: int, dtype: torch.dtype) -> MoE:
    text = preset(
        "tiny", num_local_experts=experts, hidden_size=width, intermediate_size=width
    ).text
    layer = MoE(text)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=width**-0.5)
    return layer.to(dtype)


def forward(layer: MoE, x: torch.Tensor) -> None:
    with torch.inference_mode():
        layer(x)


def training(layer: MoE, x: torch.Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(torch.ones_like(x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2048, 16384])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    missed: list[str] = []
    layers = {e: make(e, args.width, dtype) for e in COUNTS}
    for tokens in args.tokens:
        x = torch.randn(1, tokens, args.width, dtype=dtype, requires_grad=True)
        for name, run in (("forward", forward), ("training", training)):
            if name == "training" and tokens == 1:
                continue
            repeat = max(1, 300 // tokens)
            times: dict[int, list[float]] = {e: [] for e in COUNTS}
            for _ in range(args.rounds + 1):
                for e, layer in layers.items():
                    start = time.perf_counter()
                    for _ in range(repeat):
                        run(layer, x)
                    times[e].append((time.perf_counter() - start) / repeat)
            median = {e: statistics.median(t[1:]) for e, t in times.items()}
            line = {"pass": name, "tokens": tokens, "width": args.width, "dtype": args.dtype,
                    "us_per_token_at_4": round(median[4] / tokens * 1e6, 2),
                    "ratio_to_4_experts": {e: round(m / median[4], 2) for e, m in median.items()}}  # fmt: skip
            print(json.dumps(line), flush=True)
            if tokens in (1, max(args.tokens)) and median[128] > 1.15 * median[4]:
                missed.append(f"{name} of {tokens} tokens: {median[128] / median[4]:.2f}x")
    if missed:
        sys.exit("not flat within 15 %: " + "; ".join(missed))


if __name__ == "__main__":
    main()
