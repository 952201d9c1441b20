"""Two-digit addition: a toy learns it from examples to about 30 %, from rewards alone, then takes a light DPO.

    python benchmarks/rl_addition.py --out runs/addition [--seed 0]

A nano text model from random weights; train and test pairs never meet. DPO's pairs are its own right and
wrong answers. Prints greedy accuracy on test pairs. Stopped at any moment, the same command goes on.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import herdling
from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.eval.harness import evaluate
from herdling.infer.engine import Engine
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import METRICS
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig
from herdling.optim.schedule import Schedule
from herdling.recipes import dpo
from herdling.recipes.rl_run import PAGE
from herdling.rollouts.config import FilterConfig
from herdling.rollouts.pairs import write_pairs
from herdling.tasks.arithmetic import Arithmetic
from herdling.tasks.mixture import TaskSource
from herdling.train.config import OnlineConfig, PolicyConfig
from herdling.train.loop import Every, fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.online import Online
from herdling.train.policy import PolicyLoss
from herdling.train.preference import PreferenceConfig
from herdling.train.signals import Stopped
from herdling.train.state import CheckpointConfig, State

Say = Callable[[LM, str], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enough", type=float, default=0.3, help="accuracy at which SFT stops")
    parser.add_argument("--steps", type=int, default=800, help="of RL")
    parser.add_argument("--rate", type=float, default=5e-4)
    args = parser.parse_args()
    task = Arithmetic(args.seed, most=99, operations="+")

    def say(lm: LM, what: str) -> float:
        found = evaluate(lm, task, 300, max_tokens=6).accuracy
        print(
            f"{what}: {found:.1%} greedy, {time.process_time():.0f} CPU s of this call", flush=True
        )
        return found

    if not (args.out / "tuned").exists():
        imitate(task, args, say)
    if not (args.out / "played").exists():
        lm = herdling.load(args.out / "tuned")
        lm.engine = Engine(lm.model, lm.tokenizer, page=PAGE)
        practise(lm, task, args, say)
        herdling.save(lm, args.out / "played")
    pairs = args.out / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(
            herdling.load(args.out / "played"), [(task, 1.0)], pairs, count=512, max_tokens=6
        )
    dpo.main(dpo.Config(
        model=str(args.out / "played"), data=str(pairs), out=args.out / "dpo", steps=32, pairs=512,
        length=128, seed=args.seed, split="all", preference=PreferenceConfig(sft=0.2),
        optimizer=AdamWConfig(learning_rate=args.rate / 50, weight_decay=0.0),
        resume=(args.out / "dpo" / METRICS).exists(),
    ))  # fmt: skip
    say(herdling.load(args.out / "dpo" / "model"), "DPO")


def state(out: Path) -> State:
    config = CheckpointConfig(every=50, keep=1)
    return State(out, show=False, resume=(out / METRICS).exists(), config=config)


def imitate(task: Arithmetic, args: argparse.Namespace, say: Say) -> None:
    texts = [f"What is {i} + {i}? Calculate {i}. How much is {i} + 1 =" for i in range(100)]
    tok = Tokenizer.train(texts, 320, single_digits=True)
    config = preset("nano", vision=False, vocab_size=len(tok))
    lm = LM(initialize(build(config), args.seed), tok)
    source = TaskSource(task, tok)
    loader = Loader(Mixture([(source, 1.0)]), length=128, batch_size=16, pad=tok.pad)

    def enough(at: State) -> None:
        if say(lm, f"SFT step {at.step}") >= args.enough:
            herdling.save(lm, args.out / "tuned")
            raise Stopped("enough", 0)

    optimizer = adamw.build(lm.model, AdamWConfig(learning_rate=2e-3))
    try:
        fit(lm.model, optimizer, loader, next_token, schedule=Schedule(kind="constant"), steps=4000,
            hooks=[Every(100, enough)], accelerator=make_accelerator(), state=state(args.out / "sft"))  # fmt: skip
    except Stopped:
        if not (args.out / "tuned").exists():
            raise


def practise(lm: LM, task: Arithmetic, args: argparse.Namespace, say: Say) -> None:
    policy = PolicyConfig()
    online = Online(lm, [(task, 1.0)], OnlineConfig(prompts=16, samples=8, max_tokens=6, length=128),
                    policy, FilterConfig(refills=0), pool=4000, seed=args.seed)  # fmt: skip
    loss = PolicyLoss(policy)
    optimizer = adamw.build(lm.model, AdamWConfig(learning_rate=args.rate, weight_decay=0.0))
    fit(lm.model, optimizer, online, loss, schedule=Schedule(kind="linear", warmup=10), steps=args.steps,
        hooks=[Every(50, lambda at: say(lm, f"RL step {at.step}"))], weight=loss.weight,
        accelerator=make_accelerator(), state=state(args.out / "rl"))  # fmt: skip


if __name__ == "__main__":
    main()
