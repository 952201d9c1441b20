"""Does a judge learn faster from a pruned mixture of experts than from random weights?

    python benchmarks/pruned_guard.py --model runs/demo/model [--steps 100] [--seeds 0 1 2]

Prunes the model to its shared experts (`herdling guard prune`), makes a model of the same shapes with random
weights, tunes both with `herdling sft` for equally many steps on Llama Guard's question about template texts
(three categories), and judges held-out texts of new templates through the engine. Prints one JSON object;
status 1 unless the pruned start is better on every seed. About two minutes a run of 100 steps on one core.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from herdling.checkpoint.card import Card
from herdling.checkpoint.open import open_model
from herdling.checkpoint.save import save_model
from herdling.guard.corpus import Split, texts
from herdling.guard.prompt import question
from herdling.guard.prune import prune
from herdling.guard.taxonomy import CATEGORIES
from herdling.infer.lm import load
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.init import initialize
from herdling.model.llama import build

ASKED = {name: CATEGORIES[name] for name in ("S1", "S9", "P1")}


def conversations(split: Split, count: int, seed: int) -> list[tuple[list[Any], str]]:
    """Questions and right answers, half of them safe; texts of other categories are left out."""
    found = []
    for text in texts(split, 8 * count, seed):
        if text.kind == "builtin" or text.category not in (None, *ASKED) or len(text.text) > 160:
            continue
        answer = "safe" if text.category is None else f"unsafe\n{text.category}"
        found.append((question([{"role": "user", "content": text.text}], ASKED), answer))
    safe = [pair for pair in found if pair[1] == "safe"][: count // 2]
    unsafe = [pair for pair in found if pair[1] != "safe"][: count - count // 2]
    return [pair for both in zip(safe, unsafe, strict=False) for pair in both]


def random_start(like: Path, out: Path, seed: int) -> None:
    """A folder of the same shapes and tokenizer with fresh weights."""
    _, config = open_model(like)
    processor = None if config.vision is None else ImageProcessor.open(like)
    model = initialize(build(config), seed)
    save_model(model, config, out, Tokenizer.open(like), processor, card=Card(name="random"))


def tune(start: Path, data: Path, out: Path, args: argparse.Namespace, seed: int) -> float:
    """Tune with the usual recipe; returns the mean loss of the last ten steps."""
    command = [sys.executable, "-m", "herdling", "sft", "--model", str(start), "--data", str(data)]
    command += ["--out", str(out), "--steps", str(args.steps), "--rows", str(args.rows)]
    command += ["--length", "384", "--split", "all", "--seed", str(seed)]
    command += ["--optimizer.learning-rate", "1e-3"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return statistics.mean(losses[-10:])


def judged(folder: Path, pairs: list[tuple[list[Any], str]]) -> dict[str, float]:
    """Shares of verdicts that are right: safe or not, and with the right category."""
    lm = load(str(folder))
    prompts = [lm.render(messages) for messages, _ in pairs]
    said = [c.text.strip() for c in lm.generate(prompts, max_tokens=8, temperature=0.0)]
    word = [a.split()[0] == b.split()[0] for a, (_, b) in zip(said, pairs, strict=True) if a]
    exact = [a == b for a, (_, b) in zip(said, pairs, strict=True)]
    return {"safe_or_not": sum(word) / len(pairs), "exact": sum(exact) / len(pairs)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a mixture of experts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tests", type=int, default=200)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        prune(args.model, work / "pruned")
        for seed in args.seeds:
            random_start(work / "pruned", work / f"random{seed}", seed)
            data = work / f"train{seed}.jsonl"
            with data.open("w") as file:
                for messages, answer in conversations("train", 4000, seed):
                    said = [*messages, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"messages": said}) + "\n")
            tests = conversations("test", args.tests, seed)
            for name, start in (("pruned", work / "pruned"), ("random", work / f"random{seed}")):
                out = work / f"{name}-run{seed}"
                loss = tune(start, data, out, args, seed)
                rows.append(
                    {"start": name, "seed": seed, "loss": loss, **judged(out / "model", tests)}
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"steps": args.steps, "rows_of_384": args.rows, "runs": rows}, indent=1))
    pairs = [[r for r in rows if r["seed"] == seed] for seed in args.seeds]
    return int(not all(pruned["exact"] > fresh["exact"] for pruned, fresh in pairs))


if __name__ == "__main__":
    sys.exit(main())
