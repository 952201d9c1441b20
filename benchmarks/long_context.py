"""A prompt of a million positions in bounded memory: time a token and bytes by position.

    python benchmarks/long_context.py [--positions 1048576] [--heads 1] [--json FILE]

`nano` with random weights: three local layers of 32 positions a chunk and one global layer. With
`--heads 1` the global layer's attention, which costs positions times positions, takes minutes instead
of hours. Prints, every eighth of the way, the time a prompt token took, the pages that local and
global layers hold, and the process's resident memory. The exit status says whether the local layers
held more than a chunk and a piece, or the cache more than its budget.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

from herdling.infer.engine import Engine
from herdling.infer.pages import Layers
from herdling.infer.request import Request
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positions", type=int, default=2**20)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--piece", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.train(["a few words to begin with"], 320)
    config = preset(
        "nano", vision=False, vocab_size=len(tokenizer), num_attention_heads=args.heads,
        max_position_embeddings=args.positions + 64,
    )  # fmt: skip
    model = initialize(build(config), seed=0).eval()
    layers = Layers(config.text)
    pages = args.positions // layers.global_tokens + args.piece // layers.local_tokens + 16
    size = layers.units * layers.global_tokens * layers.slot_size * 4
    budget = (pages + 1) * size
    engine = Engine(model, tokenizer, memory=budget, step_tokens=args.piece, reuse=False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (args.positions,), generator=generator).tolist()
    engine.add(Request(ids, max_tokens=8))
    scheduler = engine._ready().scheduler
    rows, marks, local_most, done = [], 8, 0, 0
    start = last = time.perf_counter()
    while engine.busy:
        engine.step()
        if not scheduler.running:
            break
        memory = scheduler.running[0].memory
        local_most = max(local_most, len(memory.local.pages))
        if memory.computed - done >= args.positions // marks or memory.computed == args.positions:
            now = time.perf_counter()
            if memory.computed == done:
                continue
            row = {
                "position": memory.computed,
                "us_a_token": round((now - last) / (memory.computed - done) * 1e6, 1),
                "seconds": round(now - start, 1),
                "local_bytes": len(memory.local.pages) * size,
                "global_bytes": len(memory.whole.pages) * size,
                "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            last, done = now, memory.computed
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    bound = (layers.chunk or 0) // layers.local_tokens + 1
    if local_most > bound:
        sys.exit(f"local layers held {local_most} pages after a step; a chunk has {bound - 1}")


if __name__ == "__main__":
    main()
