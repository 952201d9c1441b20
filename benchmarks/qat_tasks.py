"""What rounding costs in task accuracy, and what each stage of `herdling qat` gives back.

    python benchmarks/qat_tasks.py runs/demo/tune/model --format int2_g32 --out runs/qat_tasks [--seed 0]

From one tuned model: the chain (tuning with rounded weights, an adapter over the frozen codes, DPO on both)
beside the same tuning in float, each judged as it stands and rounded, on test items of the demo's tasks,
greedy. Lines of JSON go to OUT/scores.jsonl as they come; what is there is not done again. Some 15 minutes a seed
and format on one core.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from herdling.eval.harness import evaluate
from herdling.infer.lm import LM, load
from herdling.optim.adamw import AdamWConfig
from herdling.quant import qat
from herdling.quant.schemes import scheme
from herdling.recipes import qat as chain
from herdling.recipes import sft
from herdling.recipes.demo_stages import MANNERS, TASKS, TUNE
from herdling.recipes.rl_run import open_tasks

RATE = 3e-4
LENGTH, ROWS = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", help="a tuned model folder")
    parser.add_argument("--format", default="int2_g32")
    parser.add_argument("--out", type=Path, default=Path("runs/qat_tasks"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--full", type=int, default=300, help="steps of the first stage, and in float"
    )
    parser.add_argument("--adapter", type=int, default=150)
    parser.add_argument("--preference", type=int, default=40)
    parser.add_argument("--items", type=int, default=300)
    args = parser.parse_args()
    out = args.out / f"{args.format}-{args.seed}"
    config = chain.Config(
        model=args.model, out=out / "chain", data=TUNE + MANNERS, format=args.format, length=LENGTH, rows=ROWS,
        full=chain.Full(args.full, RATE), adapter=chain.Adapter(args.adapter, 2 * RATE),
        preference=chain.Preference(args.preference, RATE / 30, pairs=8 * args.preference, data="preferences"),
        seed=args.seed,
    )  # fmt: skip
    longer = out / "float"
    if not (longer / "model").exists():
        sft.main(sft.Config(
            model=args.model, out=longer, data=config.data, steps=args.full, length=LENGTH, rows=ROWS,
            optimizer=AdamWConfig(learning_rate=RATE), seed=args.seed, resume=True,
        ))  # fmt: skip
    chain.main(config)
    arms = {
        "tuned": lambda: (load(args.model), None),
        "rounded": lambda: (rounded(args.model, args.format), None),
        "tuned longer": lambda: (load(longer / "model"), None),
        "tuned longer, rounded": lambda: (rounded(longer / "model", args.format), None),
        "QAT": lambda: (load(config.out / "full" / "quantized"), None),
        "QAT, then an adapter": lambda: adapted(config.out / "adapter"),
        "QAT, adapter, then DPO": lambda: adapted(config.out / "preference"),
    }
    path = out / "scores.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for arm in arms.keys() - {line["arm"] for line in lines}:
        started = time.process_time()
        lm, adapter = arms[arm]()
        side = None if lm.processor is None else lm.processor.size
        found = {
            task.name: evaluate(lm, task, args.items, max_tokens=24, adapter=adapter).accuracy
            for task, _ in open_tasks(",".join(TASKS), 0, side)
        }
        lines.append({"arm": arm, "seed": args.seed, "format": args.format, "tasks": found,
                      "cpu_seconds": round(time.process_time() - started)})  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    print(table(sorted(lines, key=lambda line: list(arms).index(line["arm"]))))


def rounded(folder: Path | str, name: str) -> LM:
    """To the nearest, as QAT leaves a model: also activations, embedding and head to int8."""
    lm = load(folder)
    qat.prepare(lm.model, scheme(name), ends=True)
    qat.convert(lm.model)
    return lm


def adapted(stage: Path) -> tuple[LM, str]:
    return load(stage / "quantized", adapters={"own": stage / "adapter"}), "own"


def table(lines: list[dict]) -> str:
    names = list(lines[0]["tasks"])
    rows = [f"| | {' | '.join(names)} | mean |", "| --- |" + " --: |" * (len(names) + 1)]
    for line in lines:
        shares = [line["tasks"][name] for name in names]
        rows.append(f"| {line['arm']} | " + " | ".join(f"{100 * x:.0f}" for x in [*shares, mean(shares)]) + " |")  # fmt: skip
    return "\n".join(rows)


if __name__ == "__main__":
    main()
