"""Tokens a second of the data loader on built-in data, on one core, tokenisation included.

Run: OMP_NUM_THREADS=1 python benchmarks/loader_speed.py [--json FILE]

Every figure is of CPU time, so that a busy machine does not change it much; the second column is
what that would cost a training run of 8,000 tokens a second.
"""

import argparse
import json
import time
from pathlib import Path

from herdling.data.embedded import texts
from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.data.spec import Opening, open_sources
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.tasks.mixture import makers

LENGTH, ROWS, BATCHES, TRAINING = 512, 16, 64, 8000
CASES = {
    "text": "code:4,english:3,multilingual:3",
    "text and pictures": "builtin",
    "pictures": "pictures",
    "tasks": "tasks",
}


def measure(spec: str, tok: Tokenizer) -> dict[str, float]:
    """Tokens per CPU second over BATCHES batches, and the share of places filled."""
    processor = ImageProcessor(size=32, patch_size=4)
    opening = Opening(tok, length=LENGTH, processor=processor)
    mixture = Mixture(open_sources(spec, opening, makers()))
    loader = Loader(mixture, length=LENGTH, batch_size=ROWS, pad=tok.pad)
    start = time.process_time()
    for _ in range(BATCHES):
        next(loader)
    rate = loader.numbers()["tokens"] / (time.process_time() - start)
    return {"tokens/s": round(rate), "cost": TRAINING / rate, "fill": loader.numbers()["fill"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tok = Tokenizer.train(texts("train", limit=3_000_000), 4096)
    found = {name: measure(spec, tok) for name, spec in CASES.items()}
    for name, row in found.items():
        print(
            f"{name:18} {row['tokens/s']:>9,} tokens/s  {row['cost']:6.1%}  fill {row['fill']:.3f}"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
