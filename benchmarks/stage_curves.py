"""The curves of a demo's stages as small pictures for the documentation.

python benchmarks/stage_curves.py runs/demo docs
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from herdling.metrics import METRICS, read

PLOTS = {
    "pretrain": (("loss",), "million tokens", "nats a token"),
    "tune": (("loss",), "million tokens", "nats a token of an answer"),
    "rl": (("reward",), "steps", "mean grade of rollouts"),
    "dpo": (("chosen_reward", "rejected_reward"), "steps", "beta x log-ratio"),
}
"""Figures of each stage, and what its axes are."""


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    mean, total, found = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        found.append(mean / total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the demo's folder")
    parser.add_argument("out", type=Path, help="where the pictures go")
    args = parser.parse_args()
    for stage, (names, xlabel, ylabel) in PLOTS.items():
        records = read(args.run / stage / METRICS)
        figure = Figure(figsize=(5, 2.2), dpi=110, layout="constrained")
        axis = figure.subplots()
        for name in names:
            found = [r for r in records if name in r]
            x = [r["tokens"] / 1e6 if xlabel == "million tokens" else r["step"] for r in found]
            y = [r[name] for r in found]
            (line,) = axis.plot(x, y, alpha=0.25, linewidth=0.8)
            axis.plot(x, smooth(y), color=line.get_color(), label=name.replace("_", " "))
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(args.out / f"curve-{stage}.png")
        print(args.out / f"curve-{stage}.png")


if __name__ == "__main__":
    main()
