"""A training step over packed rows: taken apart into documents, and with masks.

    python benchmarks/packed_rows.py [--preset tiny] [--tokens 50] [--threads 2]

The same model and batches in turn, forward and backward; documents have some `--tokens` tokens each.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from herdling.data.packing import IGNORE
from herdling.model import llama
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.train.losses import next_token

FIND = llama.find_segments


def batch_of(rows: int, length: int, tokens: int, words: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows full of documents of `tokens` tokens, give or take a half."""
    g = torch.Generator().manual_seed(seed)
    positions, documents = torch.zeros(2, rows, length, dtype=torch.int64)
    for row in range(rows):
        at = number = 0
        while at < length:
            size = int(torch.randint(tokens // 2, 3 * tokens // 2 + 1, (), generator=g))
            end = min(length, at + max(1, size))
            positions[row, at:end] = torch.arange(end - at)
            documents[row, at:end] = number
            at, number = end, number + 1
    ids = torch.randint(words, (rows, length), generator=g)
    labels = ids.roll(-1, 1)
    labels[:, :-1][documents.diff(dim=1) != 0] = IGNORE
    labels[:, -1] = IGNORE
    return {"input_ids": ids, "labels": labels, "positions": positions, "documents": documents}


def step(model: llama.LanguageModel, batch: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    loss, _ = next_token(model, batch)
    (loss / 1000).backward()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = preset(args.preset, vision=False)
    model = llama.build(config)
    initialize(model, seed=0)
    ways = {"documents": FIND, "masks": lambda *_: None}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        make = partial(batch_of, args.rows, args.length, args.tokens)
        batch = make(config.text.vocab_size, round_)
        for name, find in ways.items():
            llama.find_segments = find
            seconds = step(model, batch)
            if round_:  # the first warms up
                times[name].append(seconds)
    taken = {name: 1000 * statistics.median(found) for name, found in times.items()}
    for name, value in taken.items():
        print(f"{name:10s} {value:7.1f} ms a step")
    print(f"documents take {taken['documents'] / taken['masks']:.2f} of the time of masks")


if __name__ == "__main__":
    main()
