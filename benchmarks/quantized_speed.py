"""Decoding one stream with weights of 16, 8 and 4 bits: the engine, and llama.cpp on files of the same model.

    python benchmarks/quantized_speed.py MODEL [--llama-bench FILE --gguf bf16.gguf q8_0.gguf q4_0.gguf]

MODEL is a plain folder (figures in docs are of `make_model.py medium --dtype bfloat16`: 1.5 B parameters,
319 M weights read a token); it is quantized in memory, all matrices of the blocks by the scheme named and
the head to 8 bits. Every round runs each contender once, in turn, and reads memory once; figures are
medians: tokens a second, and times faster than our own bfloat16. The exit status says whether int8 is 1.7
times and W4A8 2.4 times as fast.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from engine_speed import PROMPT, llama_runs, prompts
from native_kernels import bandwidth

import herdling
from herdling.infer.engine import Engine
from herdling.infer.request import Request
from herdling.model.llama import decoder_of
from herdling.quant.schemes import scheme
from herdling.quant.swap import swap

ASKED = {"w8a8": 1.7, "w4a8": 2.4}


def decoding(path: str, name: str, new: int) -> tuple[Callable[[], float], int]:
    """What gives tokens a second, and the bytes of weights that a token reads."""
    lm = herdling.load(path, dtype=torch.bfloat16)
    if name != "bfloat16":
        swap(lm.model, scheme(name))
        swap(lm.model, scheme("w8a8"), ["head"])
    engine = Engine(lm.model, lm.tokenizer, reuse=False)
    ids = prompts(1, PROMPT, lm.config.text.vocab_size).tolist()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        replies = engine.run([Request(row, max_tokens=count) for row in ids])
        assert all(len(reply.ids) == count for reply in replies)
        return time.perf_counter() - start

    return lambda: (new - 1) / (seconds(new) - seconds(1)), read_by_a_token(lm.model)


def read_by_a_token(model) -> int:
    decoder, text = decoder_of(model), model.config.text
    share = text.num_experts_per_tok / max(1, text.num_local_experts)
    tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
    return round(sum(
        t.nbytes * (share if ".experts." in name else 1)
        for name, t in tensors if "embed_tokens" not in name
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "w8a8", "w4a8"])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-bench")
    parser.add_argument("--gguf", nargs="+", default=[])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: dict[str, Callable[[], float]] = {}
    sizes: dict[str, int] = {}
    for name in args.formats:
        runs[name], sizes[name] = decoding(args.model, name, args.new)
        runs[name]()  # packs, and warms up
    for file in args.gguf:
        run = llama_runs(args.llama_bench, file, args.threads, args.new)
        runs[f"llama.cpp {Path(file).stem}"] = lambda run=run: run("decode", 1)
    buffer, reads = torch.ones(2**27), []
    rates: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(args.rounds):
        reads.append(bandwidth(buffer))
        for who, run in runs.items():
            rates[who].append(run())
    read, base = statistics.median(reads), rates[args.formats[0]]
    missed = []
    for who, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        rate = statistics.median(own)
        line = {"who": who, "tokens_per_second": round(rate, 1), "times_bfloat16": round(ratio, 2)}
        if who in sizes:
            line["MB_a_token"] = round(sizes[who] / 1e6, 1)
            line["of_read_bandwidth"] = round(sizes[who] * rate / read, 2)
        print(json.dumps(line), flush=True)
        if ratio < ASKED.get(who, 0):
            missed.append(f"{who} {ratio:.2f}x, asked {ASKED[who]}x")
    print(json.dumps({"read_GB/s": round(read / 1e9, 1)}))
    if missed:
        sys.exit("below what is asked: " + "; ".join(missed))


if __name__ == "__main__":
    main()
