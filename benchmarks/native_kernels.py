"""Native CPU kernels against torch's, each pair timed in turn over weights that no cache holds.

    python benchmarks/native_kernels.py [--tests linear experts swiglu] [--rows 1 4 16] [--threads 2]

Shapes are those of the `small` (width 512) and `medium` (2048) models of docs/performance.md. Every
call takes the next of many weight copies, `--mib` in all, so weights come from memory. A round times
all contenders once and reads memory once; printed are medians over rounds: microseconds a call,
gigabytes of weights a second, the share of read bandwidth, and how many times faster than torch.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from herdling.kernels import cpu
from herdling.kernels.cpu.library import loaded
from herdling.kernels.grouped_matmul import routed_experts

LINEAR = [
    (1024, 512),
    (512, 512),
    (32768, 512),
    (2048, 2048),
    (3072, 2048),
    (32768, 2048),
]  # (N, K)
FFN = [(512, 512), (2048, 1536)]  # (D, F)
EXPERTS = 16

Contenders = dict[str, Callable[[int], object]]
Case = tuple[str, Contenders, int, int]
"""Name, contenders (each takes the number of a copy), copies, bytes of weights a call."""


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seconds(call: Callable[[int], object], copies: int) -> float:
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
    contenders: Contenders = {
        "torch": lambda i: F.linear(F.silu(F.linear(x, gate[i])) * F.linear(x, up[i]), down[i]),
        "native": lambda i: cpu.swiglu(x, gate[i], up[i], down[i]),
    }
    return f"swiglu {short(dtype)} {D}x{inner} M={M}", contenders, copies, nbytes


TESTS = {"linear": (linear, LINEAR), "experts": (experts, FFN), "swiglu": (swiglu, FFN)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", nargs="+", default=list(TESTS), choices=TESTS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--mib", type=int, default=512, help="weights a test cycles through; more than the cache"
    )
    parser.add_argument("--json", help="file for one JSON line a test")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"native kernels: {cpu.features()}, torch {torch.__version__}, {args.threads} threads")
    buffer = torch.ones(2**27)
    cases = (
        make(getattr(torch, dtype), M, args.mib << 20, *shape)
        for make, shapes in (TESTS[test] for test in args.tests)
        for dtype in args.dtype
        for M in args.rows
        for shape in shapes
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
    print(f"{row['test']:38}", read, *times, f"x{row['times_faster']:.2f}", sep="  ", flush=True)
    return row


if __name__ == "__main__":
    main()
