"""Prompts are drawn by what the policy can learn from them, and bandits learn faster for it."""

import math

import numpy as np
import pytest
import torch

from herdling.errors import ConfigError
from herdling.rollouts.config import FilterConfig
from herdling.rollouts.curriculum import Curriculum


def test_estimates_are_own_grades_and_those_of_the_class():
    config = FilterConfig(prior=4.0, memory=10)
    curriculum = Curriculum(["a", "a", "b"], config)
    assert curriculum.pass_rates(0).tolist() == [0.5, 0.5, 0.5]
    curriculum.record(0, [1, 0, 0, 0], step=5)
    of_class = 1.5 / 5  # one right of four tries, and half a one of one
    want = [(1 + 4 * of_class) / 8, of_class, 0.5]
    assert curriculum.pass_rates(5) == pytest.approx(want)
    # Ten steps later it counts half: half a right one of two tries.
    of_class = 1.0 / 3
    want = [(0.5 + 4 * of_class) / 6, of_class, 0.5]
    assert curriculum.pass_rates(15) == pytest.approx(want)
    curriculum.record(0, [1, 1], step=15)
    assert curriculum.pass_rates(15)[0] == pytest.approx((2.5 + 4 * 3 / 5) / 8)


def test_medium_prompts_are_drawn_most_and_none_never():
    config = FilterConfig(floor=0.05, easiest=0.8, prior=0.001)
    curriculum = Curriculum([0] * 4, config)
    for prompt, right in enumerate((0, 4, 7, 8)):  # too hard, medium, too easy, solved
        curriculum.record(prompt, [1] * right + [0] * (8 - right), step=0)
    assert curriculum.weights(0) == pytest.approx(np.array([0.5, 2.5, 0.5, 0.5]), abs=2e-2)
    drawn = np.bincount([curriculum.draw(1, 0, wave)[0] for wave in range(4000)], minlength=4)
    assert drawn / 4000 == pytest.approx(np.array([0.05, 0.25, 0.05, 0.05]) / 0.4, abs=0.03)


def test_a_class_keeps_its_share_unless_it_is_solved_or_out_of_reach():
    config = FilterConfig(floor=0.01, prior=0.001)
    classes = ["easy", "easy", "medium", "medium", "solved", "solved"]
    curriculum = Curriculum(classes, config, weights=[1, 1, 2, 2, 1, 1])
    for prompt, right in enumerate((15, 14, 8, 1, 16, 16)):
        curriculum.record(prompt, [1] * right + [0] * (16 - right), step=0)
    easy, medium, solved = curriculum.weights(0).reshape(3, 2).sum(1)
    assert (easy, medium) == pytest.approx((2.0, 4.0))
    assert solved == pytest.approx(2 * 0.01, rel=0.1)
    assert curriculum.weights(0)[2] > 4 * curriculum.weights(0)[3]


def test_what_was_too_hard_becomes_due_when_forgotten_or_when_its_class_is_learnt():
    curriculum = Curriculum(["easy", "hard", "hard"], FilterConfig(memory=5, prior=4.0))
    curriculum.record(1, [0] * 16, step=0)
    before = curriculum.weights(0)[1]
    assert before < curriculum.weights(0)[0]
    assert curriculum.weights(40)[1] > 2 * before
    curriculum.record(2, [1, 0] * 16, step=0)  # one of the same class
    assert curriculum.weights(0)[1] > 1.5 * before


def test_draws_are_different_prompts_and_repeat_by_seed_step_and_wave():
    curriculum = Curriculum(range(10), FilterConfig())
    drawn = curriculum.draw(6, 3)
    assert len(set(drawn)) == 6
    assert drawn == Curriculum(range(10), FilterConfig()).draw(6, 3)
    assert drawn != curriculum.draw(6, 4)
    assert drawn != curriculum.draw(6, 3, wave=1)
    assert drawn != Curriculum(range(10), FilterConfig(), seed=1).draw(6, 3)
    rest = curriculum.draw(99, 3, without=drawn)
    assert sorted([*drawn, *rest]) == list(range(10))


def test_uniform_draws_ask_all_alike_but_for_the_weights():
    curriculum = Curriculum("ab", None, weights=[1.0, 3.0])
    curriculum.record(0, [0, 0, 0], step=0)
    drawn = [curriculum.draw(1, step)[0] for step in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.75, abs=0.03)


def test_the_record_survives():
    one, other = (Curriculum("aab", FilterConfig()) for _ in range(2))
    one.record(1, [0, 1, 1], step=2)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(one.weights(7), other.weights(7))
    assert torch.equal(one.state_dict()["record"], other.state_dict()["record"])
    other.record(0, [1], step=3)
    assert not np.array_equal(one.weights(7), other.weights(7))
    with pytest.raises(ConfigError, match="3 prompts, this one 2"):
        Curriculum("ab", FilterConfig()).load_state_dict(one.state_dict())


def test_refusals():
    with pytest.raises(ConfigError, match="no prompts"):
        Curriculum([], None)
    for bad in ({"easiest": 0.0}, {"floor": 0.0}, {"pool": 0}, {"refills": -1}, {"prior": 0.0},
                {"floor": math.inf}, {"prior": math.inf}):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(bad))):
            FilterConfig(**bad)


def bandits(seed: int, filtered: bool, steps: int = 120) -> tuple[float, float]:
    """512 prompts of four difficulties, each with a logit that REINFORCE moves: final pass@1 and the
    share of groups whose grades differ. Classes are hidden: each prompt has its own record only."""
    random = np.random.default_rng(seed)
    logits = np.repeat([-5.0, -2.0, 0.0, 3.0], 128) + 0.3 * random.standard_normal(512)
    curriculum = Curriculum([0] * 512, FilterConfig() if filtered else None, seed=seed)
    useful = 0
    for step in range(steps):
        for prompt in curriculum.draw(16, step):
            p = 1 / (1 + math.exp(-logits[prompt]))
            grades = (random.random(8) < p).astype(float)
            curriculum.record(prompt, grades.tolist(), step)
            useful += grades.std() > 0
            # d log p(grade) / d logit = grade - p, times the advantage
            logits[prompt] += 4.0 * ((grades - grades.mean()) * (grades - p)).mean()
    return float((1 / (1 + np.exp(-logits))).mean()), useful / (16 * steps)


def test_filtering_beats_uniform_draws_on_bandits_at_equal_rollouts():
    for seed in range(5):
        (uniform, share), (filtered, filtered_share) = (bandits(seed, f) for f in (False, True))
        assert filtered > uniform, seed
        assert filtered_share >= 1.2 * share, seed
