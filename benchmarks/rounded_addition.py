"""Is there a task that four bits hurt? Exact addition by a nano model: rounded, and trained with rounding.

    python benchmarks/rounded_addition.py --out runs/rounded [--seed 0]

A nano text model learns sums of two numbers to 99 from random weights until 93 % of 300 validation pairs are right
(train, validation and test pairs never meet), then 300 more steps in float or with the rounding in the forward.
Greedy accuracy on 1000 test pairs, every block matrix rounded, activations, embedding and head int8. Some ten
minutes a seed on one core; stopped at any moment, the same command goes on.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import herdling
from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.eval.harness import evaluate
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import METRICS
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.quant import qat
from herdling.quant.schemes import scheme
from herdling.tasks.arithmetic import Arithmetic
from herdling.tasks.mixture import TaskSource
from herdling.train.loop import Every, fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.signals import Stopped
from herdling.train.state import CheckpointConfig, State

FORMATS = ("w4a8", "int3_g32", "int2_g32")
RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/rounded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enough", type=float, default=0.93, help="validation accuracy to stop at")
    parser.add_argument("--more", type=int, default=300, help="steps in float or with rounding")
    parser.add_argument("--items", type=int, default=1000)
    args = parser.parse_args()
    args.out = args.out / f"seed{args.seed}"
    task = Arithmetic(args.seed, most=99, operations="+")
    tuned = args.out / "tuned"
    if not tuned.exists():
        learn(task, args, tuned)
    longer = args.out / "longer"
    if not longer.exists():
        herdling.save(train(herdling.load(tuned), task, args, "float", args.more), longer)

    def score(lm: LM) -> str:
        return f"{100 * evaluate(lm, task, args.items, max_tokens=6).accuracy:.1f}"

    print("| format | tuned | rounded | longer in float | rounded | with rounding |")
    print("| --- |" + " --: |" * 5)
    plain = score(herdling.load(tuned)), score(herdling.load(longer))
    for name in FORMATS:
        after = [score(converted(herdling.load(folder), name)) for folder in (tuned, longer)]
        lm = herdling.load(tuned)
        qat.prepare(lm.model, scheme(name), ends=True)
        train(lm, task, args, name, args.more)
        qat.convert(lm.model)
        print(f"| {name} | {plain[0]} | {after[0]} | {plain[1]} | {after[1]} | {score(lm)} |", flush=True)  # fmt: skip


def converted(lm: LM, name: str) -> LM:
    qat.prepare(lm.model, scheme(name), ends=True)
    qat.convert(lm.model)
    return lm


def learn(task: Arithmetic, args: argparse.Namespace, tuned: Path) -> None:
    texts = [f"What is {i} + {i}? Calculate {i}. How much is {i} + 1 =" for i in range(100)]
    tok = Tokenizer.train(texts, 320, single_digits=True)
    config = preset("nano", vision=False, vocab_size=len(tok))
    lm = LM(initialize(build(config), args.seed), tok)

    def enough(at: State) -> None:
        found = evaluate(lm, task, 300, max_tokens=6, split="validation").accuracy
        print(f"step {at.step}: {found:.1%}", flush=True)
        if found >= args.enough:
            herdling.save(lm, tuned)
            raise Stopped("enough", 0)

    try:
        train(lm, task, args, "tune", 8000, Every(100, enough))
    except Stopped:
        if not tuned.exists():
            raise
    if not tuned.exists():
        raise SystemExit(
            f"seed {args.seed} did not reach {args.enough:.0%} in 8000 steps; try another"
        )


def train(lm: LM, task: Arithmetic, args: argparse.Namespace, name: str, steps: int, *hooks: Every) -> LM:  # fmt: skip
    loader = Loader(Mixture([(TaskSource(task, lm.tokenizer), 1.0)]), length=128, batch_size=16, pad=lm.tokenizer.pad)  # fmt: skip
    schedule = Schedule(kind="constant" if hooks else "linear", warmup=10)
    out = args.out / name
    state = State(out, show=False, resume=(out / METRICS).exists(), config=CheckpointConfig(every=100, keep=1))  # fmt: skip
    rate = RATE if hooks else RATE / 2
    fit(lm.model, adamw.build(lm.model, AdamWConfig(learning_rate=rate)), loader, next_token, schedule=schedule,
        steps=steps, hooks=list(hooks), accelerator=make_accelerator(), state=state)  # fmt: skip
    return lm


if __name__ == "__main__":
    main()
