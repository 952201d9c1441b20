"""python -m pytest tests/optim/test_schedule.py"""

import math
from itertools import pairwise

import pytest

from herdling.errors import ConfigError
from herdling.optim.schedule import Schedule


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_rises_linearly_peaks_once_and_ends_at_the_final_share(kind):
    got = curve(Schedule(kind, warmup=4, final=0.1), 50)
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert got[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(got[4:]))


def test_cosine_is_a_cosine():
    got = curve(Schedule("cosine", warmup=0, final=0.0), 101)
    expected = [(1 + math.cos(math.pi * i / 100)) / 2 for i in range(101)]
    assert got == pytest.approx(expected)


def test_linear_is_a_line():
    assert curve(Schedule("linear", warmup=0, final=0.0), 5) == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0]
    )


def test_wsd_stays_and_then_falls_in_its_last_share():
    got = curve(Schedule("wsd", warmup=0.1, final=0.0, decay=0.2), 100)
    assert set(got[10:80]) == {1.0}
    assert got[80] == 1.0
    assert got[81] < 1.0
    assert got[90] == pytest.approx(1 - 10 / 19)
    assert got[-1] == 0.0


def test_constant_and_shares_of_steps():
    got = curve(Schedule("constant", warmup=0.05), 40)
    assert got == [1 / 3, 2 / 3, *[1.0] * 38]


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_shortest_runs_have_a_rate(kind, steps):
    assert all(0 < x <= 1 for x in curve(Schedule(kind, warmup=1, decay=0.5), steps))


def test_bad_settings_are_errors():
    for settings in ({"warmup": -1}, {"warmup": float("inf")}, {"final": 2}, {"decay": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Schedule(**settings)
