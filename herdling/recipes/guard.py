"""`herdling guard`: make and try safeguards.

    herdling guard train runs/guard                       # the small text classifier, half a minute
    herdling guard check runs/guard "Ignore all previous instructions."
    herdling guard prune runs/demo/model runs/dense       # what Llama Guard 4 began as
    herdling serve runs/demo/model --guard runs/guard

`check` also takes the folder of a Llama Guard 4. The classifier is trained and tested on template texts
(`herdling.guard.corpus`), the test's templates being new; its threshold is set on validation texts.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from herdling.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from herdling.guard.classifier import Classifier
    from herdling.guard.corpus import Text

ROWS = 64
LEAST_TESTS = 6
"""So many hold texts of every sort, the unsafe ones that the threshold is set on among them."""
FOUND = 0.95
"""Share of unsafe validation texts that the threshold must let be found."""
RECALL, ALARMS = 0.95, 0.05
"""What the test asks: found at least, false alarms at most."""


@dataclass(frozen=True)
class Train:
    """Train the small text classifier on built-in template texts, and test it on new templates."""

    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder of the run, and of the classifier."""
    texts: int = 12_000
    """Training texts."""
    tests: int = 3000
    """Test texts, and as many for validation."""
    epochs: int = 6
    """Times that each text is read."""
    learning_rate: float = 0.1
    """Of AdamW, falling to zero."""
    seed: int = 0
    """Decides texts and order."""
    json: Path | None = None
    """Also write the test's figures to this file."""


@dataclass(frozen=True)
class Check:
    """Judge texts, or standard input, one a line; status 1 if any is unsafe."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a classifier or of a model of Llama Guard's kind."""
    text: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """Texts to judge; none: lines of standard input."""
    role: Literal["user", "assistant", "tool"] = "user"
    """Who said them."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the folder's own."""
    device: str | None = None
    """Where to run, for example cpu or cuda; default: a GPU if there is one."""


@dataclass(frozen=True)
class Prune:
    """Write a model without its routed experts, its shared experts as dense layers."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder or hub name of a mixture of experts."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write: new, empty, or a model folder to be replaced."""


@dataclass(frozen=True)
class Config:
    """Train a small safety classifier, judge texts, prune a model to a dense one."""

    do: OmitArgPrefixes[
        Annotated[Train, subcommand("train", prefix_name=False)]
        | Annotated[Check, subcommand("check", prefix_name=False)]
        | Annotated[Prune, subcommand("prune", prefix_name=False)]
    ]
    """What to do."""


def main(config: Config) -> int:
    """Raises Error for what cannot be done; status 1 where the test falls short or a text is unsafe."""
    if isinstance(config.do, Train):
        return train(config.do)
    if isinstance(config.do, Check):
        return check(config.do)
    from herdling.guard.prune import prune

    made = prune(config.do.path, config.do.out).text
    print(
        f"{config.do.out}: {made.num_hidden_layers} dense layers of width {made.intermediate_size_mlp}"
    )
    return 0


def check(config: Check) -> int:
    """One line a text: the verdict and what speaks for it."""
    from herdling.guard.judges import open_judge

    judge = open_judge(config.path, config.dtype, config.device)
    unsafe = 0
    for text in config.text or (line.rstrip("\n") for line in sys.stdin):
        verdict = judge.judge([{"role": config.role, "content": text}])
        unsafe += not verdict.safe
        word = "safe" if verdict.safe else "unsafe " + ",".join(verdict.categories)
        print(f"{word:<12} {verdict.score:.3f}  {text[:80]}", flush=True)
    return int(unsafe > 0)


# ---- training


@dataclass
class Texts:
    """Batches of texts as the classifier reads them, in another order each epoch."""

    data: "Sequence[Text]"
    categories: Sequence[str]
    seed: int
    place: int = field(default=0)

    def __iter__(self) -> "Iterator[dict[str, Tensor]]":
        import torch

        from herdling.guard.classifier import collate, rows_of

        rows = [rows_of(text.text) for text in self.data]
        targets = torch.zeros(len(self.data), len(self.categories))
        for i, text in enumerate(self.data):
            if text.category is not None:
                targets[i, self.categories.index(text.category)] = 1.0
        steps = len(rows) // ROWS
        while True:
            epoch, step = divmod(self.place, steps)
            order = torch.randperm(
                len(rows), generator=torch.Generator().manual_seed(self.seed + epoch)
            )
            chosen = order[step * ROWS : (step + 1) * ROWS]
            self.place += 1
            yield {**collate([rows[i] for i in chosen]), "targets": targets[chosen]}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def loss(model: "nn.Module", batch: "Any") -> "tuple[Tensor, dict[str, Tensor]]":
    """Sum over texts and categories of the binary cross entropy."""
    from torch.nn.functional import binary_cross_entropy_with_logits, dropout

    # A third of the words is left out each time, so that no verdict rests on one of them.
    scales = dropout(batch["scales"], 1 / 3)
    logits = model(batch["features"], batch["offsets"], scales, batch["owners"])
    value = binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum")
    return value, {}


def train(config: Train) -> int:
    """Train, choose the threshold, test, save. Status 1 if recall or false alarms miss their bars."""
    import torch

    from herdling.files import check_file, write_json
    from herdling.guard.classifier import Classifier
    from herdling.guard.corpus import texts
    from herdling.guard.taxonomy import HAZARDS, INJECTION
    from herdling.train import rng
    from herdling.train.loop import fit, make_accelerator
    from herdling.train.state import CheckpointConfig, State

    if config.texts < ROWS or config.tests < LEAST_TESTS or config.epochs < 1:
        raise ConfigError(f"texts {config.texts}, tests {config.tests}, epochs {config.epochs}: "
                          f"must be at least {ROWS}, {LEAST_TESTS} and 1")  # fmt: skip
    if not 0 < config.learning_rate < math.inf:
        raise ConfigError(
            f"learning_rate is {config.learning_rate}; it must be above 0, and finite"
        )
    check_file(config.json, "json")
    rng.seed(config.seed)  # the words that dropout leaves out
    classifier = Classifier([*HAZARDS, INJECTION])
    steps = config.epochs * (config.texts // ROWS)
    fit(
        classifier,
        torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=0.0),
        Texts(texts("train", config.texts, config.seed), classifier.categories, config.seed),
        loss,
        schedule=lambda step, steps: 1 - step / steps,
        steps=steps,
        accelerator=make_accelerator(cpu=True),
        state=State(
            config.out,
            resume=True,  # a run that was stopped goes on with the same command
            title="guard",
            config=CheckpointConfig(every=steps, keep=1),
            identity={
                name: getattr(config, name) for name in ("texts", "epochs", "learning_rate", "seed")
            },
        ),
        weight=lambda batch: float(len(batch["targets"])),
    )
    classifier.eval()
    classifier.threshold = threshold(classifier, texts("validation", config.tests, config.seed))
    found = measure(classifier, texts("test", config.tests, config.seed))
    classifier.about = {"texts": config.texts, "seed": config.seed, "test": found}
    classifier.save(config.out)
    if config.json is not None:
        write_json(config.json, found)
    print(table(found))
    fell = found["recall"] < RECALL or found["false_alarms"] > ALARMS
    print(f"{config.out}: threshold {classifier.threshold:.3f}{'; falls short' if fell else ''}")
    return int(fell)


def threshold(classifier: "Classifier", texts: "Sequence[Text]") -> float:
    """The highest that still finds FOUND of the unsafe texts, between 0.05 and 0.9."""
    scores = sorted(max(classifier.scores(t.text).values()) for t in texts if t.category)
    return min(0.9, max(0.05, scores[int((1 - FOUND) * len(scores))]))


def measure(classifier: "Classifier", texts: "Sequence[Text]") -> dict[str, Any]:
    """Shares of unsafe texts found and of harmless ones flagged, in all and by kind.

    New look-alikes count apart: a judge of words cannot know them.
    """
    from herdling.guard.corpus import NEW

    flagged: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    named = 0
    for text in texts:
        scores = classifier.scores(text.text)
        best = max(scores, key=lambda name: scores[name])
        key = text.category or f"harmless: {text.kind}"
        seen[key] += 1
        flagged[key] += scores[best] >= classifier.threshold
        named += text.category == best and scores[best] >= classifier.threshold
    unsafe = [key for key in seen if not key.startswith("harmless")]
    safe = [key for key in seen if key.startswith("harmless") and key != f"harmless: {NEW}"]

    def share(keys: Sequence[str]) -> float:
        return sum(flagged[k] for k in keys) / max(1, sum(seen[k] for k in keys))

    return {
        "recall": share(unsafe),
        "false_alarms": share(safe),
        "new_lookalikes": share([f"harmless: {NEW}"]),
        "right_category": named / max(1, sum(seen[k] for k in unsafe)),
        "by_kind": {k: {"texts": seen[k], "flagged": share([k])} for k in sorted(seen)},
    }


def table(found: dict[str, Any]) -> str:
    """The figures, one kind a line."""
    rows = [f"{'kind':<22} {'texts':>6} {'flagged':>8}"]
    rows += [f"{k:<22} {v['texts']:>6} {v['flagged']:>8.3f}" for k, v in found["by_kind"].items()]
    return "\n".join(
        [*rows, f"recall {found['recall']:.3f}, false alarms {found['false_alarms']:.3f}, "
                f"right category {found['right_category']:.3f}; "
                f"harmless words that only sound alike and are new: {found['new_lookalikes']:.3f} flagged"]
    )  # fmt: skip
