"""Leaving out what is easy before tuning: a pool of examples is rated once, the hard part is kept.

herdling sft ... --judge loss:runs/base/model --keep hard:0.5

RUN/ratings.jsonl    a line for each rated example; a run that was cut short goes on from there,
                     with the same judge
RUN/judge.json       what was kept and dropped, by source
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from herdling import distributed
from herdling.data.mixture import by_turns
from herdling.data.sources import Example, Source, shuffled
from herdling.data.spec import Weighted
from herdling.errors import ConfigError, DataError
from herdling.eval.judge import Judge, open_judge
from herdling.files import write_json
from herdling.inputs.tokenizer import Tokenizer
from herdling.metrics import Progress

_AT_ONCE = 64


def parse_keep(keep: str) -> tuple[str, float]:
    """('hard' or 'easy', share) of such as hard:0.5; raises ConfigError."""
    side, _, share = keep.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if side not in ("hard", "easy") or not 0 < value < 1:
        raise ConfigError(f"keep is {keep!r}; write hard:0.5, the share of the pool to train on")
    return side, value


class Kept:
    """The examples of a source at some indices, in an order that is new each time round."""

    def __init__(self, source: Source, indices: Sequence[int], seed: int) -> None:
        self.name = source.name
        self.size: int | None = len(indices)
        self._source, self._indices, self._key = source, indices, f"kept/{source.name}/{seed}"

    def example(self, index: int) -> Example:
        return self._source.example(self._indices[shuffled(index, len(self._indices), self._key)])


def keep_part(
    sources: Weighted, spec: str, keep: str, pool: int, tok: Tokenizer, seed: int, out: Path
) -> tuple[Weighted, str]:
    """The sources cut down to what the judge `spec` finds hard, and a sentence on it.

    The hardest share of the whole pool stays, so a source that is easy as a whole may lose more than
    another; sources that lose everything drop out. Examples without a verdict are dropped and counted.
    """
    side, share = parse_keep(keep)
    places = []
    for place in by_turns([source.size for source, _ in sources], [w for _, w in sources]):
        places.append(place)
        if len(places) == pool:
            break
    asked = Counter(j for j, _ in places)
    if unasked := [source.name for j, (source, _) in enumerate(sources) if not asked[j]]:
        raise ConfigError(
            f"pool is {pool}, which leaves nothing of {', '.join(unasked)} to rate; remedy: a larger --pool"
        )
    if distributed.is_main():
        _rate(sources, places, spec, tok, seed, out / "ratings.jsonl")
    distributed.barrier()
    known = _read(out / "ratings.jsonl", _by(spec, seed))
    rated = [(known[_word(sources[j][0].example(i))], j, i) for j, i in places]
    usable = [(r if side == "hard" else -r, -n, j, i) for n, (r, j, i) in enumerate(rated) if r is not None]  # fmt: skip
    if 2 * len(usable) < len(places):
        raise DataError(
            f"judge {spec} gave a verdict on {len(usable)} of {len(places)} examples; remedy: a larger "
            "model, or loss:FOLDER"
        )
    # Of the rated ones: else what has no verdict would be made up for by what is easy.
    count = max(1, round(share * len(usable)))
    by_source: dict[int, list[int]] = defaultdict(list)
    for *_, j, i in sorted(usable, reverse=True)[:count]:
        by_source[j].append(i)
    kept: Weighted = [
        # Its share shrinks with what it lost: else the few hard ones of an easy source come again and again.
        (Kept(source, sorted(by_source[j]), seed), weight * len(by_source[j]) / asked[j])
        for j, (source, weight) in enumerate(sources)
        if by_source[j]
    ]
    dropped = {s.name: 1 - len(by_source[j]) / asked[j] for j, (s, _) in enumerate(sources)}
    if distributed.is_main():
        write_json(
            out / "judge.json",
            {
                "judge": spec,
                "keep": keep,
                "pool": len(places),
                "kept": sum(map(len, by_source.values())),
                "without_verdict": len(places) - len(usable),
                "dropped": dropped,
            },
        )
        shares = ", ".join(f"{name} {lost:.0%}" for name, lost in dropped.items())
        none = len(places) - len(usable)
        unrated = f", {none} without a verdict," if none else ""
        print(f"of {len(places)} examples{unrated} {count} stay; dropped as {'easy' if side == 'hard' else 'hard'}: {shares}")  # fmt: skip
    return kept, f"the {side} {share:.0%} of {len(usable)} examples, rated by {spec}"


def _rate(
    sources: Weighted, places: Sequence[tuple[int, int]], spec: str, tok: Tokenizer, seed: int, path: Path
) -> None:  # fmt: skip
    """Append the ratings that `path` does not have yet."""
    by = _by(spec, seed)
    known = _read(path, by)
    judge: Judge | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress("judge", len(places)) as progress, path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill cut short
        for start in range(0, len(places), _AT_ONCE):
            part = places[start : start + _AT_ONCE]
            examples = [sources[j][0].example(i) for j, i in part]
            new = {word: e for e in examples if (word := _word(e)) not in known}
            if new:
                judge = judge or open_judge(spec, tok, seed)
                for (word, example), rating in zip(new.items(), judge.rate(list(new.values())), strict=True):  # fmt: skip
                    known[word] = rating
                    line: dict[str, Any] = {
                        "example": word,
                        "source": example.domain,
                        "rating": rating,
                        "by": by,
                    }
                    file.write(json.dumps(line) + "\n")
                file.flush()
            progress.update(start + len(part), "")


def _by(spec: str, seed: int) -> str:
    """Whose ratings may stand in for one another: lots and sampled replies go by the seed too."""
    return f"{spec} seed {seed}" if spec == "random" or spec.startswith("pass:") else spec


def _read(path: Path, by: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed; it is rated again
        if record.get("by") == by:
            found[record["example"]] = record["rating"]
    return found


def _word(example: Example) -> str:
    """The content of an example as one word."""
    digest = hashlib.blake2b(np.array(example.tokens, dtype=np.int32).tobytes(), digest_size=12)
    if example.tiles is not None:
        digest.update(example.tiles.numpy().tobytes())
    return digest.hexdigest()
