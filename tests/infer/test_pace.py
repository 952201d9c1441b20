"""Run: python -m pytest tests/infer/test_pace.py. One thread or all, by a clock that the test moves."""

import pytest
import torch

from herdling.infer.pace import LEAST_STEPS, PRICE, Pace


class Machine:
    """A clock, and how long a token takes with one thread and with all."""

    def __init__(self, one: float, all: float) -> None:
        self.now, self.one, self.all = 0.0, one, all

    def __call__(self) -> float:
        return self.now

    def steps(self, pace: Pace, count: int, tokens: int = 8) -> list[bool]:
        chosen = []
        for _ in range(count):
            with pace(tokens) as one:
                self.now += tokens * (self.one if one else self.all)
                chosen.append(one)
        return chosen


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_the_faster_way_wins_whichever_it_is():
    for one, all in ((1.0, 0.6), (1.0, 20.0)):
        machine = Machine(one, all)
        pace = Pace(machine)
        machine.steps(pace, 200)
        late = machine.steps(pace, 2000)
        assert late.count(all > one) > 0.93 * len(late)


@pytest.mark.usefixtures("two_threads")
def test_trials_cost_a_small_share_of_the_time():
    machine = Machine(1.0, 20.0)
    pace = Pace(machine)
    chosen = machine.steps(pace, 20_000)
    lost = chosen.count(False) * 8 * 19
    assert chosen.count(False) >= 2  # it goes on trying
    assert lost <= machine.now / PRICE + 8 * 19


@pytest.mark.usefixtures("two_threads")
def test_it_follows_when_others_come_and_go():
    machine = Machine(1.0, 0.6)
    pace = Pace(machine)
    machine.steps(pace, 500)
    machine.all = 20.0
    assert machine.steps(pace, 40)[10:].count(True) > 25  # at once: the usual way became slow
    machine.all = 0.6
    machine.steps(pace, 3 * PRICE * 20)
    assert machine.steps(pace, 300).count(False) > 270


@pytest.mark.usefixtures("two_threads")
def test_one_size_learns_from_another():
    machine = Machine(1.0, 50.0)
    pace = Pace(machine)
    machine.steps(pace, LEAST_STEPS, tokens=64)
    machine.steps(pace, LEAST_STEPS + 1, tokens=8)
    assert False in pace.sizes[4].seconds
    assert True not in [not one for one in machine.steps(pace, 100, tokens=64)]


@pytest.mark.usefixtures("two_threads")
def test_a_step_has_the_threads_that_were_chosen():
    pace = Pace()
    with pace(4) as one:
        assert one
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_with_one_thread_there_is_nothing_to_choose():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pace = Pace()
        with pace(4) as one:
            assert one
        assert not pace.sizes
    finally:
        torch.set_num_threads(before)
