"""Up to how many tokens is a step faster as one native call than by torch?

    python benchmarks/fused_steps.py [--preset small] [--threads 1 2] [--dtype float32 bfloat16]

Reads prompts of several lengths through the engine, with all blocks in one call and with torch alone in
turn, on random weights. Prints the median milliseconds of each (torch, one call); the limits are
`herdling.infer.native.MOST_FUSED` and `NARROW`.
"""

import argparse
import json
import statistics
import time

import torch

from herdling.data.embedded import texts
from herdling.infer.engine import Engine
from herdling.infer.request import Request
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96, 128])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    tokenizer = Tokenizer.train(list(texts("train", limit=100_000)), 512)
    for dtype in args.dtype:
        model = initialize(build(preset(args.preset)), seed=0).to(getattr(torch, dtype)).eval()
        for threads in args.threads:
            torch.set_num_threads(threads)
            engine = Engine(model, tokenizer, reuse=False, memory=2**28)
            native = engine._ready().runner._native
            native.longest = max(args.lengths)
            found = {}
            for length in args.lengths:
                took: dict[bool, list[float]] = {False: [], True: []}
                for seed in range(args.rounds + 1):
                    generator = torch.Generator().manual_seed(seed)
                    ids = torch.randint(200, (length,), generator=generator).tolist()
                    for fused in took:
                        native.fits = fused
                        engine.add(Request(ids, max_tokens=1))
                        began = time.perf_counter()
                        while engine.busy:
                            engine.step()
                        took[fused].append(time.perf_counter() - began)
                found[length] = [round(1e3 * statistics.median(t[1:]), 1) for t in took.values()]
            print(
                json.dumps({"preset": args.preset, "dtype": dtype, "threads": threads, "ms": found})
            )


if __name__ == "__main__":
    main()
