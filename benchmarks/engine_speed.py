"""Decoding and reading prompts: Herdling's engine against transformers with sparse experts, in turn.

    python benchmarks/engine_speed.py MODEL [--dtype bfloat16] [--streams 1 8] [--llama-bench FILE --gguf FILE]

MODEL is a folder; figures here are of `make_model.py small` (145.8 M parameters, 16 experts, top-1).
The peer is transformers with its MoE layer patched to run chosen experts only (the fair opponent), in
`generate` for decoding and one forward for prompts. Every round runs each contender once, in turn;
figures are medians. llama.cpp, where its `llama-bench` is given, runs in the same rounds.
The exit status says whether decoding is twice as fast and prompts are read at least as fast.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import transformers
from model_speed import patch_sparse
from transformers import AutoModelForCausalLM

import herdling
from herdling.infer.engine import Engine
from herdling.infer.request import Request

PROMPT, LONG = 16, 512


def peer_runs(path: str, dtype: torch.dtype, new: int) -> Callable[[str, int], float]:
    model = patch_sparse(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval())
    model.generation_config.eos_token_id = None

    def decode(x: torch.Tensor, count: int) -> float:
        start = time.perf_counter()
        model.generate(x, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                       attention_mask=torch.ones_like(x))  # fmt: skip
        return time.perf_counter() - start

    def run(test: str, streams: int) -> float:
        with torch.inference_mode():
            if test == "prompt":
                x = prompts(1, LONG, model.config.vocab_size)
                start = time.perf_counter()
                model(x, use_cache=True, logits_to_keep=1)
                return LONG / (time.perf_counter() - start)
            x = prompts(streams, PROMPT, model.config.vocab_size)
            return streams * (new - 1) / (decode(x, new) - decode(x, 1))

    return run


def our_runs(path: str, dtype: torch.dtype, new: int) -> Callable[[str, int], float]:
    lm = herdling.load(path, dtype=dtype)
    engine = Engine(lm.model, lm.tokenizer, reuse=False)
    size = lm.config.text.vocab_size

    def decode(ids: list[list[int]], count: int) -> float:
        start = time.perf_counter()
        replies = engine.run([Request(row, max_tokens=count) for row in ids])
        assert all(len(reply.ids) == count for reply in replies)
        return time.perf_counter() - start

    def run(test: str, streams: int) -> float:
        if test == "prompt":
            return LONG / decode(prompts(1, LONG, size).tolist(), 1)
        ids = prompts(streams, PROMPT, size).tolist()
        return streams * (new - 1) / (decode(ids, new) - decode(ids, 1))

    return run


def llama_runs(bench: str, gguf: str, threads: int, new: int) -> Callable[[str, int], float]:
    def run(test: str, streams: int) -> float:
        words = ["-p", str(LONG), "-n", "0"] if test == "prompt" else ["-p", "0", "-n", str(new)]
        out = subprocess.run([bench, "-m", gguf, "-t", str(threads), "-r", "1", "-o", "jsonl", *words],
                             capture_output=True, text=True, check=True)  # fmt: skip
        return json.loads(out.stdout.splitlines()[-1])["avg_ts"]

    return run


def prompts(rows: int, length: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size - 64, (rows, length), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-bench")
    parser.add_argument("--gguf")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    missed: list[str] = []
    for name in args.dtype:
        dtype = getattr(torch, name)
        runs = {
            "sparse": peer_runs(args.model, dtype, args.new),
            "herdling": our_runs(args.model, dtype, args.new),
        }
        for test, streams in [*(("decode", n) for n in args.streams), ("prompt", 1)]:
            rounds = dict(runs)
            if args.llama_bench and streams == 1:
                rounds["llama.cpp"] = llama_runs(
                    args.llama_bench, args.gguf, args.threads, args.new
                )
            rates: dict[str, list[float]] = {who: [] for who in rounds}
            for run in rounds.values():
                run(test, streams)
            for _ in range(args.rounds):
                for who, run in rounds.items():
                    rates[who].append(run(test, streams))
            median = {who: statistics.median(r) for who, r in rates.items()}
            ratio = median["herdling"] / median["sparse"]
            line = {"test": test, "streams": streams, "dtype": name, "ratio": round(ratio, 2),
                    "tokens_per_second": {who: round(r, 1) for who, r in median.items()}}  # fmt: skip
            print(json.dumps(line), flush=True)
            asked = 1.0 if test == "prompt" else 2.0
            if ratio < asked:
                missed.append(f"{test} {streams} {name}: {ratio:.2f}x, asked {asked}x")
        del runs
    if missed:
        sys.exit("below what is asked: " + "; ".join(missed))


if __name__ == "__main__":
    main()
