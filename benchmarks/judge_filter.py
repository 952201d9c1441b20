"""Is the hard part of the tuning data worth more than a random part of the same size?

    python benchmarks/judge_filter.py runs/demo/pretrain/model --judge loss:runs/demo/tune/model --seed 0

From one pretrained model, two runs of `herdling sft` with equal steps on the same pool of examples: on
the hardest half by a judge, and on a random half. Both are asked the same held-out items; `hard` are
those half of each task's items that the judge finds harder. With --rl-steps both then play three of the
tasks for that long (Llama 4's order) and are asked again. Prints a table and writes a line of JSON.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from herdling.data.record_source import joined
from herdling.data.sources import Example
from herdling.eval.harness import evaluate
from herdling.eval.judge import open_judge
from herdling.infer.lm import LM, load
from herdling.inputs import chat
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import rl, sft
from herdling.recipes.demo_stages import RATES
from herdling.tasks.base import Task
from herdling.tasks.registry import open_task
from herdling.train.config import OnlineConfig

TASKS = ("read_number", "locate_shape", "shape_colour", "largest_bar", "cldr_names", "arithmetic")


PLAY = "locate_shape,shape_colour,largest_bar"


def rendered(lm: LM, task: Task, items: int) -> list[Example]:
    found = []
    for i in range(items):
        item = task.item(i, "test")
        made = chat.render(item.conversation(), lm.tokenizer, None, False, processor=lm.processor)
        found.append(Example(made.ids, made.loss_mask, joined(made.tiles), task.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path, help="pretrained model folder")
    parser.add_argument("--judge", required=True, help="as in herdling sft")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pool", type=int, default=4096)
    parser.add_argument("--rl-steps", type=int, default=0)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the figures here")
    args = parser.parse_args()
    lm = load(args.base)
    side = lm.processor.size if lm.processor else None
    tasks = [open_task(name, 0, side) for name in TASKS]
    judge = open_judge(args.judge, lm.tokenizer)
    hard: dict[str, list[int]] = {}
    for task in tasks:
        ratings = [r or 0.0 for r in judge.rate(rendered(lm, task, args.items))]
        order = sorted(range(args.items), key=lambda i: ratings[i])
        hard[task.name] = order[args.items // 2 :]
    result: dict[str, dict[str, dict[str, float]]] = {}

    def ask(arm: str, model: Path) -> None:
        tuned = load(model)
        result[arm] = {}
        for task in tasks:
            score = evaluate(tuned, task, args.items, max_tokens=24)
            on_hard = sum(score.grades[i] for i in hard[task.name]) / len(hard[task.name])
            result[arm][task.name] = {"all": score.accuracy, "hard": on_hard}

    for arm, spec in (("hard half", args.judge), ("random half", "random")):
        out = Path(tempfile.mkdtemp(prefix="judge-"))
        config = sft.Config(
            model=str(args.base), data=",".join(TASKS), out=out / "run", steps=args.steps, rows=8,
            length=256, judge=spec, keep="hard:0.5", pool=args.pool, seed=args.seed + 1,
            optimizer=AdamWConfig(learning_rate=7.5e-4, weight_decay=0.05, rates=RATES),
            schedule=Schedule(kind="linear", warmup=30),
        )  # fmt: skip
        sft.main(config)
        ask(arm, out / "run" / "model")
        dropped = json.loads((out / "run" / "judge.json").read_text())["dropped"]
        print(f"{arm}: dropped " + ", ".join(f"{n} {v:.0%}" for n, v in dropped.items()))
        if args.rl_steps:
            rl.main(rl.Config(
                model=str(out / "run" / "model"), tasks=PLAY, out=out / "rl", steps=args.rl_steps,
                online=OnlineConfig(prompts=16, samples=8, max_tokens=24, length=256), seed=args.seed,
                optimizer=AdamWConfig(learning_rate=3e-4, weight_decay=0.0, rates=RATES),
                evaluate_every=args.rl_steps, evaluate_items=16,
            ))  # fmt: skip
            ask(f"{arm}, RL", out / "rl" / "model")
        shutil.rmtree(out)
    print(f"\n{'task':<14}" + "".join(f"{arm + ', all':>22}{arm + ', hard':>22}" for arm in result))
    for name in TASKS:
        cells = "".join(
            f"{of[name]['all']:>22.1%}{of[name]['hard']:>22.1%}" for of in result.values()
        )
        print(f"{name:<14}{cells}")
    means = {arm: {part: sum(t[part] for t in of.values()) / len(of) for part in ("all", "hard")}
             for arm, of in result.items()}  # fmt: skip
    print(f"{'mean':<14}" + "".join(f"{m['all']:>22.1%}{m['hard']:>22.1%}" for m in means.values()))
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps({"seed": args.seed, "steps": args.steps, "rl_steps": args.rl_steps, "judge": args.judge.partition(":")[0], "means": means, "tasks": result}) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
