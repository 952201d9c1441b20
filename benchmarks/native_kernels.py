"""Native CPU kernels against torch's, each pair timed in turn over weights that no cache holds.

    python benchmarks/native_kernels.py [--tests linear experts int8 w4a8-g32] [--rows 1 4 16]
    python benchmarks/native_kernels.py --tests gemm-w8a8 gemm-w4a8-g32 --rows 64 512 --dtype bfloat16

Shapes are those of the `small` (width 512) and `medium` (2048) models of docs/performance.md. Every
call takes the next of many weight copies, `--mib` in all and on large pages for both, so weights come from
memory. A round times all contenders once, each after a pause in which the other's threads fall asleep, and
reads memory once; printed are medians over rounds: microseconds a call, gigabytes of weights a second,
the share of read bandwidth, and how many times faster than torch (for packed experts: than native experts
in the activations' type; for ternary: than W4A8; for gemm: than F.linear in bfloat16; their bytes are not
those shown).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

from herdling.kernels import cpu
from herdling.kernels.cpu import packed
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.pages import collapse
from herdling.kernels.grouped_matmul import routed_experts

LINEAR = [
    (1024, 512),
    (512, 512),
    (32768, 512),
    (2048, 2048),
    (3072, 2048),
    (32768, 2048),
]  # (N, K)
WIDE = LINEAR[3:]
FFN = [(512, 512), (2048, 1536)]  # (D, F)
EXPERTS = 16

Contenders = dict[str, Callable[[int], object]]
Case = tuple[str, Contenders, int, int]
"""Name, contenders (each takes the number of a copy), copies, bytes of weights a call."""


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(call: Callable[[int], object], copies: int) -> float:
    time.sleep(0.03)  # torch's threads spin for milliseconds after their last operation
    start = time.perf_counter()
    for i in range(copies):
        call(i)
    return (time.perf_counter() - start) / copies


def bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second of reading `buffer` with all threads."""
    library = loaded()
    assert library is not None
    start = time.perf_counter()
    library.herdling_read(buffer.data_ptr(), buffer.numel(), torch.get_num_threads())
    return buffer.nbytes / (time.perf_counter() - start)


def compare(
    name: str, contenders: Contenders, copies: int, nbytes: float, buffer, rounds: int
) -> dict:
    times: dict[str, list[float]] = {who: [] for who in contenders}
    reads = []
    for call in contenders.values():
        seconds(call, min(copies, 4))
    for _ in range(rounds):
        reads.append(bandwidth(buffer))
        for who, call in contenders.items():
            times[who].append(seconds(call, copies))
    read = statistics.median(reads)
    row: dict = {"test": name, "read_GB/s": round(read / 1e9, 1)}
    for who, values in times.items():
        t = statistics.median(values)
        row[who] = {
            "us": round(t * 1e6, 1),
            "GB/s": round(nbytes / t / 1e9, 1),
            "of_read": round(nbytes / t / read, 2),
        }
    ratios = [t / n for t, n in zip(times["torch"], times["native"], strict=True)]
    row["times_faster"] = round(statistics.median(ratios), 2)
    return row


def linear(dtype: torch.dtype, M: int, budget: int, N: int, K: int) -> Case:
    nbytes = N * K * dtype.itemsize
    copies = max(4, budget // nbytes)
    weights, x = torch.randn(copies, N, K, dtype=dtype), torch.randn(M, K, dtype=dtype)
    collapse([weights])
    contenders: Contenders = {
        "torch": lambda i: F.linear(x, weights[i]),
        "native": lambda i: cpu.linear(x, weights[i]),
    }
    return f"linear {short(dtype)} {N}x{K} M={M}", contenders, copies, nbytes


def experts(dtype: torch.dtype, M: int, budget: int, D: int, inner: int) -> Case:
    one = 3 * D * inner * dtype.itemsize
    E = max(EXPERTS, budget // one)  # as many as fill the budget
    gate_up = torch.randn(E, D, 2 * inner, dtype=dtype) * 0.05
    down = torch.randn(E, inner, D, dtype=dtype) * 0.05
    collapse([gate_up, down])
    x, gates = torch.randn(M, D, dtype=dtype), torch.rand(M, 1, dtype=dtype)
    # Rows meet as many experts as independent uniform choices of 16 do on average.
    met = max(1, round(EXPERTS * (1 - (1 - 1 / EXPERTS) ** M)))
    chosen = [(torch.arange(M) % met + i * met)[:, None] for i in range(E // met)]
    contenders: Contenders = {
        "torch": lambda i: routed_experts(x, chosen[i], gates, gate_up, down),
        "native": lambda i: cpu.experts(x, chosen[i], gates, gate_up, down),
    }
    name = f"experts {short(dtype)} {D}x{inner} M={M}, {met} met"
    return name, contenders, len(chosen), met * one


def swiglu(dtype: torch.dtype, M: int, budget: int, D: int, inner: int) -> Case:
    nbytes = 3 * D * inner * dtype.itemsize
    copies = max(4, budget // nbytes)
    gate, up = (torch.randn(copies, inner, D, dtype=dtype) * 0.05 for _ in range(2))
    down, x = torch.randn(copies, D, inner, dtype=dtype) * 0.05, torch.randn(M, D, dtype=dtype)
    collapse([gate, up, down])
    contenders: Contenders = {
        "torch": lambda i: F.linear(F.silu(F.linear(x, gate[i])) * F.linear(x, up[i]), down[i]),
        "native": lambda i: cpu.swiglu(x, gate[i], up[i], down[i]),
    }
    return f"swiglu {short(dtype)} {D}x{inner} M={M}", contenders, copies, nbytes


def copied(weight: packed.Packed, copies: int) -> list[packed.Packed]:
    """The same matrix so many times, one after the other in memory."""
    codes, scales = (t.expand(copies, *t.shape).contiguous() for t in (weight.codes, weight.scales))
    collapse([codes, scales])
    return [replace(weight, codes=c, scales=s) for c, s in zip(codes, scales, strict=True)]


def int8(dtype: torch.dtype, M: int, budget: int, N: int, K: int) -> Case:
    """W8A8 here, weight-only in torch: the only fast int8 product torch has for these shapes."""
    copies = max(4, budget // (N * K))
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scales, x = torch.rand(N), torch.randn(M, K, dtype=dtype)
    weights = copied(packed.pack(codes, scales), copies)
    theirs, plain = scales.to(dtype), codes.expand(copies, N, K).contiguous()
    collapse([plain])
    contenders: Contenders = {
        "torch": lambda i: torch._weight_int8pack_mm(x, plain[i], theirs),
        "native": lambda i: packed.linear(x, weights[i]),
    }
    return f"int8 {short(dtype)} {N}x{K} M={M}", contenders, copies, weights[0].nbytes


def four_bits(form: str, dtype: torch.dtype, M: int, budget: int, N: int, K: int) -> Case:
    """Against torch's weight-only int4 in groups of as many, whose scales are pairs of `dtype`."""
    copies, x = max(4, budget // (N * K // 2)), torch.randn(M, K, dtype=dtype)
    group = 128 if form.endswith("g128") else 32
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    scales = torch.rand(N, K // group).half()
    weights = copied(four_bit(form, codes, scales, group), copies)
    one = torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    theirs = one.expand(copies, *one.shape).contiguous()
    collapse([theirs])
    pairs = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).to(dtype).contiguous()
    contenders: Contenders = {
        "torch": lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, theirs[i], group, pairs),
        "native": lambda i: packed.linear(x, weights[i]),
    }
    return f"{form} {short(dtype)} {N}x{K} M={M}", contenders, copies, weights[0].nbytes


def four_bit(form: str, codes: torch.Tensor, scales: torch.Tensor, group: int) -> packed.Packed:
    floats = form.startswith("weight-only")
    if "mxfp4" in form:
        exponents = torch.randint(110, 128, scales.shape, dtype=torch.uint8)
        return packed.pack_mxfp4((codes + 8).to(torch.uint8), exponents, floats)
    return packed.pack(codes, scales, group, floats)


def ternary(dtype: torch.dtype, M: int, budget: int, N: int, K: int) -> Case:
    """Against W4A8 in groups of 32, both native."""
    copies, x = max(4, budget // (N * K // 2)), torch.randn(M, K, dtype=dtype)
    codes, scales = torch.randint(-1, 2, (N, K), dtype=torch.int8), torch.rand(N)
    mine = copied(packed.pack_ternary(codes, scales), 2 * copies)
    other = copied(packed.pack(codes, torch.rand(N, K // 32).half(), 32), copies)
    contenders: Contenders = {
        "torch": lambda i: packed.linear(x, other[i % copies]),
        "native": lambda i: packed.linear(x, mine[i]),
    }
    return f"ternary {short(dtype)} {N}x{K} M={M}", contenders, 2 * copies, mine[0].nbytes


def gemm(form: str, dtype: torch.dtype, M: int, budget: int, N: int, K: int) -> Case:
    """Many rows: integer tiles against F.linear in bfloat16."""
    copies, x = max(4, budget // (N * K * 2)), torch.randn(M, K, dtype=dtype)
    plain = torch.randn(copies, N, K, dtype=dtype)
    collapse([plain])
    if form == "w8a8":
        codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        weights = copied(packed.pack(codes, torch.rand(N)), copies)
    else:
        group = 128 if form.endswith("g128") else 32
        codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
        weights = copied(packed.pack(codes, torch.rand(N, K // group).half(), group), copies)
    contenders: Contenders = {
        "torch": lambda i: F.linear(x, plain[i]),
        "native": lambda i: packed.linear(x, weights[i]),
    }
    return f"gemm {form} {short(dtype)} {N}x{K} M={M}", contenders, copies, weights[0].nbytes


def router(dtype: torch.dtype, M: int, budget: int, E: int, k: int) -> Case:
    """Choice of k of E experts and their gates, a token: the C code itself, as a layer runs it."""
    N, library = 1000, loaded()
    assert library is not None
    logits = torch.randn(N, E)
    chosen, gates = torch.empty(N, k, dtype=torch.int64), torch.empty(N, k)
    where = logits.data_ptr(), chosen.data_ptr(), gates.data_ptr()
    contenders: Contenders = {
        "torch": lambda i: torch.sigmoid(logits[i : i + 1].topk(k).values),
        "native": lambda i, kept=(chosen, gates): library.herdling_route(*where, 1, E, k),
    }
    return f"router top-{k} of {E}, one call a token", contenders, N, E * 4


def packed_experts(group: int, dtype: torch.dtype, M: int, budget: int, D: int, inner: int) -> Case:
    """Packed experts against the same experts in `dtype`, both native."""
    name, contenders, calls, _ = experts(dtype, M, budget, D, inner)
    met = max(1, round(EXPERTS * (1 - (1 - 1 / EXPERTS) ** M)))
    E = max(calls, budget // (3 * D * inner // (2 if group else 1)) // met) * met

    def random(outputs: int, inputs: int) -> packed.Packed:
        most = 7 if group else 127
        codes = torch.randint(-most, most + 1, (outputs, inputs), dtype=torch.int8)
        scales = (
            torch.rand(outputs, inputs // group).half() / 100
            if group
            else torch.rand(outputs) / 1000
        )
        one = packed.pack(codes, scales, group)
        copies = (one.codes.repeat(E, 1, 1, 1), one.scales.repeat(E, 1, 1))
        collapse(copies)
        return replace(one, codes=copies[0], scales=copies[1], experts=E)

    gate_up, down = random(2 * inner, D), random(D, inner)
    x, gates = torch.randn(M, D, dtype=dtype), torch.rand(M, 1, dtype=dtype)
    chosen = [(torch.arange(M) % met + i * met)[:, None] for i in range(E // met)]
    pair: Contenders = {
        "torch": lambda i: contenders["native"](i % calls),
        "native": lambda i: packed.experts(x, chosen[i], gates, gate_up, down),
    }
    nbytes = (gate_up.nbytes + down.nbytes) * met // E
    return f"{f'w4a8 g{group}' if group else 'int8'} {name}", pair, len(chosen), nbytes


TESTS = {
    "linear": (linear, LINEAR),
    "experts": (experts, FFN),
    "swiglu": (swiglu, FFN),
    "int8": (int8, LINEAR),
    **{
        form: (partial(four_bits, form), LINEAR)
        for form in (
            "w4a8-g32",
            "w4a8-g128",
            "mxfp4-a8",
            "weight-only-int4-g32",
            "weight-only-mxfp4",
        )
    },
    "ternary": (ternary, LINEAR),
    **{f"gemm-{f}": (partial(gemm, f), WIDE) for f in ("w8a8", "w4a8-g32", "w4a8-g128")},
    "int8-experts": (partial(packed_experts, 0), FFN),
    "w4a8-experts": (partial(packed_experts, 32), FFN),
    "router": (router, [(16, 1), (128, 1), (64, 4)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", nargs="+", default=list(TESTS), choices=TESTS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 1536, 2048], help="inputs")
    parser.add_argument(
        "--mib", type=int, default=512, help="weights a test cycles through; more than the cache"
    )
    parser.add_argument("--json", help="file for one JSON line a test")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"native kernels: {cpu.features()}, torch {torch.__version__}, {args.threads} threads")
    buffer = torch.ones(2**27)
    collapse([buffer])
    cases = (
        cast(Callable[..., Case], make)(getattr(torch, dtype), M, args.mib << 20, *shape)
        for make, shapes in (TESTS[test] for test in args.tests)
        for dtype in args.dtype
        for M in args.rows
        for shape in shapes
        if shape[-1] in args.widths or make is router
    )
    with torch.inference_mode():
        rows = [told(compare(*case, buffer, args.rounds)) for case in cases]
    if args.json:
        Path(args.json).write_text("".join(json.dumps(row) + "\n" for row in rows))


def told(row: dict) -> dict:
    times = [
        f"{who} {n['us']:8.1f} us {n['GB/s']:5.1f} GB/s {n['of_read']:4.0%}"
        for who, n in row.items()
        if isinstance(n, dict)
    ]
    read = f"read {row['read_GB/s']:4.1f}"
    print(f"{row['test']:48}", read, *times, f"x{row['times_faster']:.2f}", sep="  ", flush=True)
    return row


if __name__ == "__main__":
    main()
