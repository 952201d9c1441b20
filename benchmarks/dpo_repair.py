"""What does RL overdo when nothing holds it back, and does a light DPO repair it without losing the reward?

    python benchmarks/dpo_repair.py runs/demo/tune/model --out runs/repair [--seed 0]

The demo's tuned model plays counts and bars with neither examples nor averaging beside, at the demo's rate times
--heat; then preference pairs about manners follow (--dpo-rate). After each stage 300 test items a task: greedy for
manners and for what is not played, drawn at temperature 1 for what is, and the mean length of a reply in
characters. Lines of JSON go to OUT/scores.jsonl; a stage that is there is not done again. Some 7 minutes a seed on
one core.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from herdling.eval.harness import evaluate
from herdling.infer.lm import LM, load
from herdling.recipes import demo_stages as demo
from herdling.recipes import dpo, rl
from herdling.recipes.rl_run import open_tasks

MANNERS = ("refusals", "form")
OTHERS = ("locate_shape", "shape_colour", "cldr_names", "languages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("model", help="a tuned model folder")
    parser.add_argument("--out", type=Path, default=Path("runs/repair"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heat", type=float, default=2.0, help="times the demo's rate of RL")
    parser.add_argument("--rl-steps", type=int, default=150)
    parser.add_argument("--dpo-steps", type=int, default=40)
    parser.add_argument("--dpo-rate", type=float, default=2e-5)
    parser.add_argument("--items", type=int, default=300)
    args = parser.parse_args()
    out = args.out / f"seed{args.seed}"
    whole = demo.Config(out=out, rl_steps=args.rl_steps, dpo_steps=args.dpo_steps, seed=args.seed)
    played = demo.playing(whole)
    hot = replace(played.optimizer, learning_rate=args.heat * played.optimizer.learning_rate)
    light = demo.preferring(whole)
    slow = replace(light.optimizer, learning_rate=args.dpo_rate)
    after = out / f"dpo-{args.dpo_rate:g}"
    path = out / "scores.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    stages = {
        "tuned": (Path(args.model), None),
        "RL": (
            played.out / "model",
            lambda: rl.main(replace(played, model=args.model, examples="", start_share=0.0, optimizer=hot)),
        ),
        f"DPO {args.dpo_rate:g}": (
            after / "model",
            lambda: dpo.train(replace(light, data=",".join(MANNERS), out=after, optimizer=slow)),
        ),
    }  # fmt: skip
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for stage, (model, make) in stages.items():
        if any(line["stage"] == stage for line in done):
            continue
        if make and not (model / "config.json").exists():
            make()
        done.append({"stage": stage, "seed": args.seed, **scores(load(model), args.items)})
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


def scores(lm: LM, items: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for names, temperature in ((MANNERS + OTHERS, 0.0), (demo.PLAY.split(","), 1.0)):
        side = None if lm.processor is None else lm.processor.size
        for task, _ in open_tasks(",".join(names), 0, side):
            got = evaluate(lm, task, items, max_tokens=24, keep=items, temperature=temperature)
            found[task.name] = got.accuracy
            found[f"{task.name} characters"] = mean(len(sample.reply) for sample in got.samples)
    return found


def table(lines: list[dict[str, Any]]) -> str:
    names = [*demo.PLAY.split(","), *MANNERS, *OTHERS]
    rows = [f"| | {' | '.join(names)} | characters |", "| --- |" + " --: |" * (len(names) + 1)]
    for line in lines:
        shares = " | ".join(f"{100 * line[name]:.1f}" for name in names)
        length = mean(line[f"{name} characters"] for name in MANNERS)
        rows.append(f"| {line['stage']} | {shares} | {length:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
