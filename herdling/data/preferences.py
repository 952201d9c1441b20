"""Preference pairs: a question with two answers, one of them better, ready for the model.

    sources = open_pairs("pairs.jsonl:3,refusals", opening, makers)
    sources[0][0].pair(0)                            # Pair(chosen=Example, rejected=Example)

Files hold the pair records of `herdling.data.records`; `makers` are further names (built-in pairs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from herdling.data.record_source import joined, resolved
from herdling.data.records import Records, Sides, sides
from herdling.data.sources import Example
from herdling.data.spec import Opening, open_files, parse
from herdling.data.text_files import TextFiles
from herdling.errors import DataError, Error
from herdling.inputs import chat
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer

Shared = Literal["none", "format", "shared"]
"""Which tokens do not count for a preference: see `counted`."""


@dataclass(frozen=True)
class Pair:
    """Two answers to the same question; the loss masks hold the answers alone, not the question."""

    chosen: Example
    rejected: Example


class PairSource(Protocol):
    """Where pairs come from."""

    name: str
    size: int | None
    """How many different pairs there are; None if new ones never end."""

    def pair(self, index: int) -> Pair:
        """The pair at `index` >= 0: always the same one."""
        ...


PairMaker = Callable[[Opening], list[tuple[PairSource, float]]]


def render_pair(
    asked: Sides,
    tok: Tokenizer,
    processor: ImageProcessor | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    name: str = "",
) -> Pair:
    """Both conversations as the model reads them. Raises InputError for what cannot be rendered."""

    def rendered(turns: Sequence[Mapping[str, Any]], opened: bool) -> chat.Rendered:
        return chat.render(
            [*asked.prompt, *turns], tok, tools, add_generation_prompt=opened, processor=processor
        )

    question = len(rendered([], True).ids)
    examples = []
    for answer in (asked.chosen, asked.rejected):
        whole = rendered(answer, False)
        mask = [m and i >= question for i, m in enumerate(whole.loss_mask)]
        examples.append(Example(whole.ids, mask, joined(whole.tiles), name))
    return Pair(*examples)


def counted(
    pair: Pair, tok: Tokenizer, without: Shared = "format"
) -> tuple[list[bool], list[bool]]:
    """Which tokens of each side tell one answer from the other.

    'none' leaves out nothing. 'format' leaves out control tokens, which end every answer, good or
    bad (arXiv 2407.21783, section 4.1.4). 'shared' also leaves out the words that both answers begin and
    end with.
    """
    places = [
        [i for i, m in enumerate(side.loss_mask) if m] for side in (pair.chosen, pair.rejected)
    ]
    sides_ = (pair.chosen.tokens, pair.rejected.tokens)
    if without != "none":
        control = set(tok.specials.values())
        places = [[i for i in at if side[i] not in control] for at, side in zip(places, sides_, strict=True)]  # fmt: skip
    if without == "shared":
        words = [[side[i] for i in at] for at, side in zip(places, sides_, strict=True)]
        before = _alike(*words)
        after = _alike(*(w[before:][::-1] for w in words))
        places = [at[before : len(at) - after] for at in places]
    masks = []
    for at, side in zip(places, sides_, strict=True):
        mask = [False] * len(side)
        for i in at:
            mask[i] = True
        masks.append(mask)
    return masks[0], masks[1]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


class RecordPairs:
    """The pairs of users' files; rendered when their turn comes."""

    def __init__(
        self, name: str, records: Records, tok: Tokenizer, processor: ImageProcessor | None = None
    ) -> None:
        if len(records.sizes) == 0:
            raise DataError(f"{name}: no record; remedy: name other files, or set split to all")
        self.name = name
        self.size: int | None = len(records.sizes)
        self._records, self._tok, self._processor = records, tok, processor

    def pair(self, index: int) -> Pair:
        where, folder, record = self._records.read(index % len(self._records.sizes))
        try:
            if "chosen" not in record:
                raise DataError("is no preference pair: it has no 'chosen' and 'rejected'")
            asked = Sides(*(_located(side, folder) for side in sides(record)))
            pair = render_pair(asked, self._tok, self._processor, record.get("tools"), self.name)
            if _same(pair.chosen, pair.rejected):
                raise DataError("chosen and rejected read the same")
            return pair
        except Error as problem:
            raise DataError(f"{where}: {problem}") from problem


def _same(one: Example, other: Example) -> bool:
    if one.tokens != other.tokens or (one.tiles is None) != (other.tiles is None):
        return False
    return one.tiles is None or other.tiles is None or torch.equal(one.tiles, other.tiles)


def _located(messages: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return [resolved(message, folder) for message in messages]


def open_pairs(
    spec: str, opening: Opening, makers: Mapping[str, PairMaker]
) -> list[tuple[PairSource, float]]:
    """The sources of pairs that a spec names, with their weights.

    Raises ConfigError for a name that is neither of `makers` nor a path, DataError for broken files.
    """
    found: list[tuple[PairSource, float]] = []
    for name, weight in parse(spec):
        made = makers[name](opening) if name in makers else [(_of_files(name, opening, sorted(makers)), 1.0)]  # fmt: skip
        total = sum(share for _, share in made)
        found += [(source, weight * share / total) for source, share in made]
    return found


def _of_files(name: str, opening: Opening, known: Sequence[str]) -> PairSource:
    records = open_files(name, opening, known)
    if isinstance(records, TextFiles):
        raise DataError(f"{name}: plain text holds no preference pairs; remedy: JSON lines")
    return RecordPairs(name, records, opening.tok, opening.processor)
