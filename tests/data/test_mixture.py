"""Shares of a mixture: exact at every moment, restorable, and disjoint between processes."""

import json

import pytest

from herdling.data.mixture import Mixture
from herdling.data.sources import Example
from herdling.errors import ConfigError, DataError


class Numbers:
    """Examples that tell their index, of a length that varies widely."""

    def __init__(self, name: str, longest: int) -> None:
        self.name, self.longest = name, longest
        self.size: int | None = None

    def example(self, index: int) -> Example:
        tokens = [index] * (1 + index * 7919 % self.longest)
        return Example(tokens, [True] * len(tokens), None, self.name)


def mixture(**settings) -> Mixture:
    return Mixture([(Numbers("long", 9000), 45), (Numbers("short", 30), 30), (Numbers("one", 1), 25)], **settings)  # fmt: skip


def test_realised_shares_follow_the_weights() -> None:
    mixed = mixture()
    tokens = 0
    while tokens < 1_000_000:
        tokens += len(mixed.next()[2].tokens)
    want = {"long": 0.45, "short": 0.30, "one": 0.25}
    assert mixed.realised() == pytest.approx(want, abs=0.01)
    by_examples = mixture(unit="examples")
    for _ in range(1000):
        by_examples.next()
    assert by_examples.realised() == pytest.approx(want, abs=0.001)


def test_a_place_is_restored_through_json() -> None:
    mixed = mixture()
    for _ in range(100):
        mixed.next()
    state = json.loads(json.dumps(mixed.state_dict(), sort_keys=True))
    want = [mixed.next()[:2] for _ in range(200)]
    other = mixture()
    other.load_state_dict(state)
    assert [other.next()[:2] for _ in range(200)] == want


def test_processes_read_different_examples_and_together_all() -> None:
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for rank in range(3):
        mixed = mixture(rank=rank, world=3, unit="examples")
        for _ in range(300):
            source, index, example = mixed.next()
            assert example.tokens[0] == index
            seen[source].append(index)
    assert sorted(seen[0]) == list(range(3 * 135))
    assert all(len(set(indices)) == len(indices) for indices in seen.values())


def test_mistakes_are_named() -> None:
    one = Numbers("a", 3)
    with pytest.raises(ConfigError, match="the mixture has no source"):
        Mixture([])
    with pytest.raises(ConfigError, match="sources a, a: each may be named once"):
        Mixture([(one, 1), (one, 2)])
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weight of a is"):
            Mixture([(one, weight)])
    with pytest.raises(ConfigError, match=r"rank is 2; it must be 0..1 \(world 2\)"):
        Mixture([(one, 1)], rank=2, world=2)
    with pytest.raises(
        DataError, match=r"was saved with data shares .*remedy: resume with the same"
    ):
        mixture().load_state_dict(Mixture([(one, 1)]).state_dict())
    with pytest.raises(DataError, match="was saved with data world 2, this one has 1"):
        mixture().load_state_dict(mixture(world=2).state_dict())
