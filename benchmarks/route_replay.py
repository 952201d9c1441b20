"""How far a bf16 sampler is from its fp32 trainer, with routes free and replayed.

    python benchmarks/route_replay.py [runs/demo/model]

Four MoE layers of random weights, one of 4, 16 or 64 experts a token, and a trained model if given.
"""

import copy
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import herdling
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.rollouts.pack import pack
from herdling.rollouts.play import Game, play
from herdling.tasks.registry import create
from herdling.train.config import PolicyConfig
from herdling.train.policy import PolicyLoss


def main() -> None:
    print("| model | flipped, free | mean abs log ratio, free | replayed | ratio |")
    print("| --- | --: | --: | --: | --: |")
    for path in sys.argv[1:]:
        row(path, herdling.load(path, dtype=torch.float32), 32)
    tok = Tokenizer.train(["what is 12 + 30? sort 4 7 1 " * 4], 320)
    for experts in (4, 16, 64):
        config = preset("nano", vision=False, vocab_size=len(tok), num_local_experts=experts)
        row(f"{experts} experts", LM(initialize(build(config), seed=1, std=0.08).eval(), tok), 16)


@torch.no_grad()
def row(name: str, lm: LM, count: int) -> None:
    sampler = LM(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer, lm.processor)
    task = create("arithmetic")
    games = [Game(task, task.item(i, "train"), seed=i) for i in range(count)]
    rollouts = play(sampler, games, max_tokens=24, temperature=1.0, experts=True)
    batch = pack(rollouts, [1.0] * count, 128, lm.tokenizer.pad)
    gaps, flips = [], []
    for replay in (False, True):
        _, numbers = PolicyLoss(PolicyConfig(replay=replay))(lm.model, batch)
        gap, flip = numbers["log_ratio"], numbers["flipped_routes"]
        gaps.append(float(gap[0] / gap[1]))
        flips.append(float(flip[0] / flip[1]))
    print(f"| {name} | {flips[0]:.1%} | {gaps[0]:.4f} | {gaps[1]:.4f} | {gaps[0] / gaps[1]:.1f} |")


if __name__ == "__main__":
    main()
