"""Does RL lift a lightly tuned model on held-out prompts, and does filtering prompts beat asking all?

    python benchmarks/rl_curriculum.py runs/demo/pretrain/model --out runs/rl

A short SFT teaches the form of the tasks; from that one model RL runs with filtered and with uniform
prompts, a seed at a time. Uniform runs get as many rollouts as the filtered run of their seed took,
groups that taught nothing included. Accuracy is that of test items, greedy and drawn at temperature
1 (pass@1). What is there already is not computed again, so seeds may run one by one.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import herdling
from herdling.data import spec
from herdling.eval.harness import evaluate
from herdling.infer.lm import LM
from herdling.metrics import METRICS, TIMING, read
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import rl, sft
from herdling.recipes.demo_stages import RATES
from herdling.recipes.rl_run import open_tasks
from herdling.rollouts.config import FilterConfig
from herdling.train.config import OnlineConfig

TASKS = "count_shapes,largest_bar,calculator:2"
SFT = (
    "count_shapes:0.2,locate_shape:0.2,shape_colour:0.2,largest_bar:0.2,calculator:5,languages:0.2"
)
"""Mostly the calculator, as copying numbers into calls is what a model this small learns last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("base", help="a pretrained model folder, such as the demo's")
    parser.add_argument("--out", type=Path, default=Path("runs/rl_curriculum"))
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--sft-steps", type=int, default=550)
    parser.add_argument("--steps", type=int, default=300, help="of the filtered runs")
    parser.add_argument("--prompts", type=int, default=16, help="groups of a step")
    parser.add_argument(
        "--kept", type=int, help="the same of the filtered runs, whose groups all teach"
    )
    parser.add_argument(
        "--among", default="", help="further tasks of the pool, that the mean leaves out"
    )
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--pool", type=int, default=2048, help="prompts of each task")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--modes", default="filtered,uniform")
    parser.add_argument("--items", type=int, default=1000, help="test items of each task")
    args = parser.parse_args()
    tuned = args.out / "sft"
    if not (tuned / "model").exists():
        sft.main(sft.Config(
            model=args.base, data=SFT, out=tuned, steps=args.sft_steps, rows=10, length=256,
            optimizer=AdamWConfig(learning_rate=1e-3, weight_decay=0.05, rates=RATES),
            schedule=Schedule(kind="linear", warmup=30, final=0.0), seed=1,
            resume=(tuned / METRICS).exists(),
        ))  # fmt: skip
    start = scores(tuned / "model", args)
    rows = []
    for seed in map(int, args.seeds.split(",")):
        for mode in args.modes.split(","):
            rows.append((seed, mode, *run(mode, seed, tuned / "model", args)))
            table(args, start, rows)


def run(mode: str, seed: int, model: Path, args: argparse.Namespace) -> tuple[dict, dict]:
    """Scores after RL, and figures of the run."""
    out = args.out / f"{mode}-{seed}"
    groups = args.prompts if mode == "uniform" else args.kept or args.prompts
    online = OnlineConfig(prompts=groups, samples=8, max_tokens=24, length=256)
    steps = args.steps
    if mode == "uniform":  # as many rollouts as the filtered run
        played = last(args.out / f"filtered-{seed}", "rollouts")
        steps = round(played / (online.prompts * online.samples))
    if not (out / "model").exists():
        started = time.process_time()
        rl.main(rl.Config(
            model=str(model), tasks=pool(args), out=out, steps=steps, curriculum=mode, seed=seed,
            online=online, filter=FilterConfig(pool=args.pool), optimizer=AdamWConfig(
                learning_rate=args.rate, weight_decay=0.0, rates=RATES),
            schedule=Schedule(kind="linear", warmup=5, final=0.0), evaluate_every=steps, evaluate_items=16,
            resume=(out / METRICS).exists(),
        ))  # fmt: skip
        (out / "cpu_seconds.json").write_text(json.dumps(time.process_time() - started))
    timing = read(out / TIMING)
    records = read(out / METRICS)
    playing = sum(r.get("rollout_seconds", 0.0) for r in timing)
    figures = {
        "steps": steps,
        "rollouts": last(out, "rollouts"),
        "useful": mean(r["useful_groups"] for r in records if "useful_groups" in r),
        "cpu": json.loads((out / "cpu_seconds.json").read_text()),
        "playing": playing,
        "rollouts/s": last(out, "rollouts") / playing,
        "log_ratio": mean(r["log_ratio"] for r in records if "log_ratio" in r),
        "flipped": mean(r["flipped_routes"] for r in records if "flipped_routes" in r),
    }
    return scores(out / "model", args), figures


def pool(args: argparse.Namespace) -> str:
    return ",".join(filter(None, [args.tasks, args.among]))


def last(folder: Path, name: str) -> float:
    return [r[name] for r in read(folder / METRICS) if name in r][-1]


def scores(model: Path, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Greedy accuracy and pass@1 of every task; kept beside the model."""
    path = model.parent / "scores.json"
    if not path.exists():
        lm: LM = herdling.load(model)
        assert lm.processor is not None
        found = {}
        for task, _ in open_tasks(pool(args), 0, lm.processor.size):
            options = {"items": args.items, "max_tokens": 24}
            found[task.name] = (
                evaluate(lm, task, **options).accuracy,
                evaluate(lm, task, **options, temperature=1.0).accuracy,
            )
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def table(args: argparse.Namespace, start: dict, rows: list[tuple]) -> None:
    """Markdown: greedy / pass@1 in percent, of each task and in the mean of `--tasks`."""
    names, others = ([name for name, _ in spec.parse(part)] if part else [] for part in (args.tasks, args.among))  # fmt: skip

    def cells(found: dict) -> list[str]:
        pairs = [found[name] for name in names]
        pairs.append(tuple(mean(column) for column in zip(*pairs, strict=True)))
        pairs += [found[name] for name in others]
        return [f"{100 * greedy:.1f} / {100 * drawn:.1f}" for greedy, drawn in pairs]

    heads = [*names, "mean", *others]
    print("\n| | " + " | ".join([*heads, "steps", "rollouts", "useful groups", "CPU s"]) + " |")  # fmt: skip
    print("| --- |" + " --: |" * (len(heads) + 4))
    print("| SFT | " + " | ".join([*cells(start), "", "", "", ""]) + " |")
    for seed, mode, found, f in rows:
        own = [f"{f['steps']}", f"{f['rollouts']:.0f}", f"{f['useful']:.0%}", f"{f['cpu']:.0f}"]
        print(f"| {mode}, seed {seed} | " + " | ".join([*cells(found), *own]) + " |")
    for seed, mode, _, f in rows:
        print(
            f"{mode} {seed}: {f['rollouts/s']:.1f} rollouts/s, mean |log ratio| {f['log_ratio']:.1e}, "
            f"flipped routes {f['flipped']:.1e}",
            file=sys.stderr,
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
