"""Several sources as one stream, each with its share.

The next example always comes from the source that is furthest behind its share, counted in tokens
(or in examples), so realised shares follow the weights to within one example at every moment, long
documents or short. Nothing is random here: the place of a mixture is a handful of counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from herdling.data.sources import Example, Source
from herdling.errors import ConfigError, DataError

Unit = Literal["tokens", "examples"]


def by_turns(sizes: Sequence[int | None], weights: Sequence[float]) -> Iterator[tuple[int, int]]:
    """(number of a source, index within it) for ever, by weight in examples; a source of a `size`
    (None: without end) gives each of its examples once, and when all have, it ends."""
    taken = [0] * len(sizes)
    while left := [j for j, size in enumerate(sizes) if size is None or taken[j] < size]:
        j = min(left, key=lambda j: taken[j] / weights[j])
        yield j, taken[j]
        taken[j] += 1


class Mixture:
    """An endless stream over weighted sources; of `world` processes, each reads every world-th."""

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        *,
        unit: Unit = "tokens",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        names = [source.name for source, _ in sources]
        if not sources:
            raise ConfigError("the mixture has no source; remedy: name one, such as builtin")
        if len(set(names)) < len(names):
            raise ConfigError(f"sources {', '.join(names)}: each may be named once")
        for source, weight in sources:
            if not 0 < weight < float("inf"):
                raise ConfigError(f"weight of {source.name} is {weight}; it must be above 0")
        if unit not in ("tokens", "examples"):
            raise ConfigError(f"unit is {unit!r}; use tokens or examples")
        if not 0 <= rank < world:
            raise ConfigError(f"rank is {rank}; it must be 0..{world - 1} (world {world})")
        self.sources = [source for source, _ in sources]
        total = sum(weight for _, weight in sources)
        self.shares = {source.name: weight / total for source, weight in sources}
        self._unit, self._rank, self._world = unit, rank, world
        self._taken = [0] * len(sources)
        """Examples that this process has had of each source."""
        self._used = [0] * len(sources)
        """Tokens (or examples) that it has had of each source."""

    def next(self) -> tuple[int, int, Example]:
        """(number of the source, index within it, the example), and step forward."""
        shares = list(self.shares.values())
        i = min(range(len(shares)), key=lambda j: self._used[j] / shares[j])
        index = self._taken[i] * self._world + self._rank
        example = self.sources[i].example(index)
        self._taken[i] += 1
        self._used[i] += max(1, len(example.tokens)) if self._unit == "tokens" else 1
        return i, index, example

    def realised(self) -> dict[str, float]:
        """The share that each source has had so far, in the unit of the weights."""
        total = sum(self._used) or 1
        return {s.name: u / total for s, u in zip(self.sources, self._used, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, and what it is the place of."""
        return {
            "shares": dict(self.shares),
            "unit": self._unit,
            "rank": self._rank,
            "world": self._world,
            "taken": list(self._taken),
            "used": list(self._used),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; raises DataError if it is the place of another mixture."""
        mine = self.state_dict()
        for key in ("shares", "unit", "rank", "world"):
            if state.get(key) != mine[key]:
                raise DataError(
                    f"the run was saved with data {key} {state.get(key)}, this one has {mine[key]}; "
                    "remedy: resume with the same --data and number of processes"
                )
        self._taken, self._used = list(state["taken"]), list(state["used"])
