"""What coding keys and values costs and saves: bytes, perplexity on held-out text, decoding speed.

    python benchmarks/kv_cache.py runs/demo/model [--length 1000] [--documents 16] [--no-speed]

Perplexity is the engine's own: prompts are scored through the very store that serves replies, so that
every token sees coded keys and values as a reply would. Three sets, the test splits of the built-in
text, one document a row; the change comes with its standard error over documents. Bytes are pages in
use times their size, scales and unused corners included, plus the open pages, at the end of each
document. Speed is that of decoding behind a prompt, all schemes in turn, medians over rounds.
"""

import argparse
import math
import statistics
import sys
import time

import torch

import herdling
from herdling.data.embedded import documents
from herdling.infer.engine import Engine
from herdling.infer.kv_quant import SCHEMES, QuantStore, layers_of
from herdling.infer.lm import LM
from herdling.infer.request import Request
from herdling.model.config import TextConfig, preset

SETS = ("code", "english", "multilingual")
LENGTHS = (8192, 32768, 131072, 1048576)
NEW = 64
"""Tokens decoded in a round."""


def held_out(lm: LM, name: str, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of `count` documents of the test split; texts too short are passed."""
    rows = []
    for document in documents(name, "test"):
        ids = [lm.tokenizer.bos, *lm.tokenizer.encode(document.text[: 16 * length])]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    return rows


def held(engine: Engine) -> int:
    """Bytes of the pages in use, and of the open pages."""
    store = engine._ready().runner.store
    rings = store.tails.nbytes if isinstance(store, QuantStore) else 0
    return engine.stats().pages_used * store.page_bytes + rings


def score(lm: LM, kv: str, rows: list[list[int]]) -> tuple[list[float], int]:
    """Mean loss in nats of each row, and the bytes that the last one held when it was read."""
    engine = Engine(lm.model, lm.tokenizer, kv=kv, reuse=False, max_running=1)
    losses, size = [], 0
    for ids in rows:
        engine.add(Request(ids, max_tokens=2, prompt_logprobs=0))
        prompt = None
        while engine.busy:
            for event in engine.step():
                prompt = event.completion.prompt if event.completion else prompt
            size = held(engine) if engine.stats().running else size
        assert prompt is not None
        losses.append(-statistics.fmean(entry.logprob for entry in prompt if entry))
    return losses, size


def perplexity(lm: LM, count: int, length: int) -> bool:
    """Print the table of sets and schemes; whether `mixed` keeps the bar."""
    kept = True
    print(f"{'set':14}{'kv':8}{'perplexity':>11}{'change %':>18}{'KiB':>9}{'fp32/':>7}{'bf16/':>7}")
    for name in SETS:
        rows = held_out(lm, name, count, length)
        plain, most = score(lm, "plain", rows)
        width = next(lm.model.parameters()).element_size()
        for kv in ("plain", *SCHEMES):
            losses, size = (plain, most) if kv == "plain" else score(lm, kv, rows)
            changes = [a - b for a, b in zip(losses, plain, strict=True)]
            change = math.expm1(statistics.fmean(changes))
            error = statistics.stdev(changes) / len(rows) ** 0.5
            ratio = most * 2 / width / size
            print(
                f"{name:14}{kv:8}{math.exp(statistics.fmean(losses)):11.2f}"
                f"{100 * change:+9.3f} +- {100 * error:.3f}{size / 1024:9.1f}"
                f"{ratio * 2:7.2f}{ratio:7.2f}",
                flush=True,
            )
            kept &= kv != "mixed" or (abs(change) <= 0.01 and ratio >= 2.4)
    return kept


def speed(lm: LM, length: int, streams: int, rounds: int) -> None:
    """Tokens per second of decoding, and of reading prompts, under each scheme."""
    rows = [[i % 256 for i in range(k, k + length)] for k in range(streams)]
    engines = {
        kv: Engine(lm.model, lm.tokenizer, kv=kv, reuse=False, max_running=streams, memory=2**28)
        for kv in ("plain", *SCHEMES)
    }
    read: dict[str, list[float]] = {kv: [] for kv in engines}
    decoded: dict[str, list[float]] = {kv: [] for kv in engines}
    for _ in range(rounds):
        for kv, engine in engines.items():
            for ids in rows:
                engine.add(Request(ids, max_tokens=NEW))
            times = [time.perf_counter()]
            first = None
            while engine.busy:
                events = engine.step()
                times.append(time.perf_counter())
                if first is None and len(events) == streams:
                    first = len(times) - 1
            assert first is not None
            read[kv].append(streams * length / (times[first] - times[0]))
            decoded[kv].append(streams * (len(times) - 1 - first) / (times[-1] - times[first]))
    for kv in engines:
        print(
            f"{streams} streams behind {length} tokens, {kv:6}: "
            f"prompt {statistics.median(read[kv]):8.0f} tokens/s, "
            f"decode {statistics.median(decoded[kv]):7.0f} tokens/s"
        )


def shapes(name: str, config: TextConfig) -> None:
    """Bytes of one sequence by exact accounting, its chunk full."""
    for length in LENGTHS:
        sizes = {}
        for kv in ("plain", *SCHEMES):
            layers = layers_of(config, kv)
            local = -(-min(length, layers.chunk or 0) // layers.local_tokens)
            pages = local + -(-length // layers.global_tokens)
            sizes[kv] = pages * layers.page_bytes(torch.bfloat16)
        ratios = ", ".join(f"{kv} {sizes['plain'] / sizes[kv]:.2f}x" for kv in SCHEMES)
        print(f"{name} at {length} positions: bf16 {sizes['plain'] / 2**20:.0f} MiB; {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    lm = herdling.load(args.model)
    shapes("scout", preset("scout").text)
    kept = perplexity(lm, args.documents, args.length)
    for streams in () if args.no_speed else (1, 8):
        speed(lm, args.length, streams, args.rounds)
    print("bar (mixed: 2.4x below bf16, 1 % of perplexity):", "kept" if kept else "missed")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
