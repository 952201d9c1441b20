"""Rollouts as batches: what is played, dropped, refilled, packed and kept for a resumed run."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from herdling.data.packing import IGNORE, cut, fill_row, stack
from herdling.data.record_source import joined
from herdling.data.sources import Example
from herdling.errors import ConfigError, DataError
from herdling.infer.lm import LM
from herdling.inputs import chat
from herdling.inputs.images import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build
from herdling.optim import adamw
from herdling.optim.adamw import AdamWConfig
from herdling.rollouts.config import FilterConfig
from herdling.rollouts.pack import beside, pack
from herdling.rollouts.play import Game, play
from herdling.tasks.base import Item, ask
from herdling.tasks.registry import create
from herdling.train.config import OnlineConfig, PolicyConfig
from herdling.train.loop import fit, make_accelerator
from herdling.train.losses import next_token
from herdling.train.online import Online
from herdling.train.policy import PolicyLoss
from herdling.train.state import State


class Parity:
    """Odd or even length of the reply; every third prompt is never right."""

    name, chance = "parity", 0.5

    def item(self, index: int, split: str) -> Item:
        return Item(ask("x" * (1 + index % 7)), "", (index % 3) / 2, str(index))

    def grade(self, item: Item, reply: str) -> float:
        return float(len(reply) % 2 and item.difficulty < 1)


def new_lm(seed: int = 0) -> LM:
    tok = Tokenizer.train(["what is 12 + 30? sort 4 7 1 " * 4], 320)
    model = initialize(build(preset("nano", vision=False, vocab_size=len(tok))), seed, std=0.1)
    return LM(model.eval(), tok)


def online(lm: LM, filtered: FilterConfig | None = None, **fields) -> Online:
    config = OnlineConfig(**{"prompts": 3, "samples": 4, "max_tokens": 5, "length": 64, **fields})
    return Online(
        lm, [(Parity(), 1.0)], config, PolicyConfig(mask_truncated=False), filtered, pool=24
    )


def same(one: Sequence[dict], other: Sequence[dict]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_a_packed_batch_is_the_rollouts_each_by_itself():
    """Losses and gradients of packed rows are those of every rollout alone, pictures included."""
    tok = Tokenizer.train(["how many shapes are there? " * 4], 320)
    config = preset("nano", vision=True, vocab_size=len(tok))
    config = replace(config, image_token_index=tok.patch)
    lm = LM(initialize(build(config), std=0.1).eval(), tok)
    tasks = [create("count_shapes"), create("arithmetic")]
    games = [Game(tasks[i % 2], tasks[i % 2].item(i, "train"), seed=i) for i in range(6)]
    rollouts = play(lm, games, max_tokens=6, temperature=1.0, experts=True)
    values = [1.0, -0.5, 0.3, 0.2, -1.0, 0.7]
    loss = PolicyLoss(PolicyConfig())
    whole = pack(rollouts, values, 160, tok.pad)
    assert whole["input_ids"].shape[0] < 6
    total, numbers = loss(lm.model, whole)
    total.backward()
    together = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    parts = [pack([r], [v], len(r.ids), tok.pad) for r, v in zip(rollouts, values, strict=True)]
    sums = [loss(lm.model, part) for part in parts]
    sum(value for value, _ in sums).backward()
    assert total.item() == pytest.approx(sum(v.item() for v, _ in sums), abs=1e-4)
    for name, parameter in lm.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad, atol=2e-5, rtol=1e-3)
    assert loss.weight(whole) == sum(map(loss.weight, parts)) == sum(r.length for r in rollouts)
    # The trainer and the sampler are the same weights in the same type.
    assert numbers["log_ratio"][0] / numbers["log_ratio"][1] < 1e-5
    assert numbers["flipped_routes"][0] == 0
    assert numbers["flipped_routes"][1] == 4 * sum(len(r.ids) - 1 for r in rollouts)
    learnt = whole["labels"] != IGNORE
    assert not whole["advantages"][~learnt].any()


class Rows:
    """Two rows of tuning examples, other ones each time; with `pictures` one in each row."""

    def __init__(self, tok: Tokenizer, length: int, pictures: ImageProcessor | None = None) -> None:
        task = create("count_shapes" if pictures else "arithmetic")
        self.tok, self.length, self.pictures, self.task, self.at = tok, length, pictures, task, 0

    def __iter__(self):
        return self

    def __next__(self):
        rows, tiles = [], []
        for _ in range(2):
            item = self.task.item(self.at, "train")
            made = chat.render(item.conversation(), self.tok, None, False, processor=self.pictures)
            example = Example(made.ids, made.loss_mask, joined(made.tiles), "rows")
            pieces = cut(example, self.length)
            assert pieces is not None
            tiles += [p.tiles for p in pieces if p.tiles is not None]
            rows.append(fill_row(pieces, self.length, self.tok.pad))
            self.at += 1
        return stack(rows, tiles)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("pictured", [("rollouts", "examples"), ("rollouts",), ("examples",), ()])
def test_examples_beside_rollouts_add_their_mean_loss_and_touch_nothing_else(pictured):
    tok = Tokenizer.train(["how many shapes are there? " * 4], 320)
    config = preset("nano", vision=True, vocab_size=len(tok))
    config = replace(config, image_token_index=tok.patch)
    lm = LM(initialize(build(config), std=0.1).eval(), tok)
    task = create("count_shapes" if "rollouts" in pictured else "arithmetic")
    games = [Game(task, task.item(i, "train"), seed=i) for i in range(4)]
    rollouts = play(lm, games, max_tokens=6, temperature=1.0, experts=True)
    alone = pack(rollouts, [1.0, -0.5, 0.3, -0.8], 160, tok.pad)
    examples = next(Rows(tok, 160, lm.processor if "examples" in pictured else None))
    loss = PolicyLoss(PolicyConfig(sft=0.25))
    both = beside(alone, examples)
    assert both["input_ids"].shape[0] == alone["input_ids"].shape[0] + 2
    assert loss.weight(both) == loss.weight(alone)

    def gradients(value: torch.Tensor) -> dict[str, torch.Tensor]:
        lm.model.zero_grad()
        value.backward()
        return {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.grad is not None}

    whole, numbers = loss(lm.model, both)
    policy, own = loss(lm.model, alone)
    nll, count = next_token(lm.model, examples)[0], (examples["labels"] != IGNORE).sum()
    parts = policy + 0.25 * loss.weight(alone) * nll / count
    assert whole.item() == pytest.approx(parts.item(), rel=1e-4)
    expected = gradients(parts)
    for name, grad in gradients(whole).items():
        torch.testing.assert_close(grad, expected[name], atol=3e-5, rtol=1e-3)
    assert numbers["example_loss"][0].item() == pytest.approx(nll.item(), rel=1e-4)
    assert numbers["example_loss"][1] == count
    for name in ("entropy", "log_ratio", "flipped_routes"):  # only of what was played
        assert [float(n) for n in numbers[name]] == pytest.approx([float(n) for n in own[name]], abs=1e-4)  # fmt: skip


def test_every_micro_batch_has_its_examples_and_a_restored_run_the_next_ones():
    lm = new_lm()

    def begin() -> Online:
        config = OnlineConfig(prompts=4, samples=4, updates=2, max_tokens=5, length=64)
        policy = PolicyConfig(mask_truncated=False, kl=0.1)
        rows = Rows(lm.tokenizer, 64)
        return Online(lm, [(Parity(), 1.0)], config, policy, None, pool=24, accumulation=2,
                      reference=lm.model, examples=rows)  # fmt: skip

    one, other = begin(), begin()
    first = [next(one) for _ in range(3)]
    examples = [batch["input_ids"][batch["rollout"][:, 0] < 0] for batch in first]
    fresh = Rows(lm.tokenizer, 64)
    for found in examples:
        assert torch.equal(found, next(fresh)["input_ids"])
    other.load_state_dict(one.state_dict())
    same([next(one) for _ in range(3)], [next(other) for _ in range(3)])


def test_filtered_batches_hold_groups_that_differ_and_others_are_played_in_their_place():
    batches = online(new_lm(), FilterConfig(refills=8))
    for _ in range(4):
        batch = next(batches)
        figures = batches.figures
        assert len(figures.kept) == 3
        assert all(group.useful for group in figures.kept)
        assert len({group.prompt for group in figures.groups}) == len(figures.groups)
        learnt = batch["labels"] != IGNORE
        for number in range(12):  # every sequence of a kept group has an advantage
            mine = learnt & (batch["rollout"] == number)
            assert batch["advantages"][mine].abs().min() > 0
    numbers = batches.numbers()
    assert numbers["rollouts"] > 4 * 12
    assert 0 < numbers["trained_pass_rate"] < 1
    assert numbers["share/parity"] == 1.0
    # Impossible prompts are known by now.
    rates = batches.curriculum.pass_rates(4)
    assert rates[2::3].mean() < 0.2 < rates[0::3].mean()


def test_uniform_batches_hold_every_group():
    batches = online(new_lm())
    useless = 0
    for _ in range(4):
        next(batches)
        assert len(batches.figures.kept) == len(batches.figures.groups) == 3
        useless += sum(not group.useful for group in batches.figures.groups)
    assert useless > 0
    assert batches.numbers()["rollouts"] == 4 * 12


def test_a_task_that_is_solved_on_the_way_teaches_nothing_and_ends_nothing():
    lm = new_lm()
    batches = online(lm, FilterConfig(refills=1))
    next(batches)
    batches.tasks[0].grade = lambda item, reply: 1.0
    batch = next(batches)
    assert batches.numbers()["useful_groups"] == 0
    loss, _ = PolicyLoss(PolicyConfig())(lm.model, batch)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in lm.model.parameters())


def test_many_refills_end_no_run():
    batches = online(new_lm(), FilterConfig(refills=30), prompts=1)
    next(batches)
    batches.tasks[0].grade = lambda item, reply: 1.0
    next(batches)
    assert len(batches.figures.groups) == 24


def test_a_pool_that_is_all_drawn_is_no_error():
    config = OnlineConfig(prompts=8, samples=4, max_tokens=5, length=64)
    batches = Online(
        new_lm(), [(Parity(), 1.0)], config, PolicyConfig(mask_truncated=False), FilterConfig(), pool=8
    )  # fmt: skip
    for _ in range(3):
        next(batches)
        assert 0 < len(batches.figures.kept) < len(batches.figures.groups) == 8
    batches.tasks[0].grade = lambda item, reply: 1.0
    next(batches)
    assert batches.numbers()["useful_groups"] == 0
    assert batches.numbers()["trained_pass_rate"] == 1


@pytest.mark.parametrize("filtered", [FilterConfig(), None])
def test_a_prompt_that_leaves_no_room_is_not_played(filtered, caplog):
    lm = new_lm()

    class Long(Parity):
        """Every other prompt fills a row; one of them more than the context."""

        def item(self, index: int, split: str) -> Item:
            text = "x" * (40_000 if index == 3 else 1 + 80 * (index % 2))
            return Item(ask(text), "", 0.5, str(index))

    config = OnlineConfig(prompts=4, samples=4, max_tokens=5, length=64)
    policy = PolicyConfig(mask_truncated=False)
    batches = Online(lm, [(Long(), 1.0)], config, policy, filtered, pool=8)
    assert "parity: 4 of 8 prompts leave no room for a reply among 64 tokens" in caplog.text
    for _ in range(3):
        next(batches)
        assert all(int(group.rollouts[0].item.key) % 2 == 0 for group in batches.figures.groups)
        assert batches.figures.left_out == 0
    with pytest.raises(
        DataError, match=r"parity: its prompts have .* no room for a reply among 9;"
    ):
        Online(lm, [(Long(), 1.0)], replace(config, length=9), policy, filtered, pool=8)


def test_micro_batches_for_which_too_few_rollouts_teach_are_filled_up():
    """One useful group with one rollout that ended: the others are of groups that were dropped."""
    batches = online(new_lm(), FilterConfig(refills=0))
    batches.accumulation = 3
    fits = {"count": 0}

    def first_of_the_kept(rollout) -> bool:
        kept = any(rollout in group.rollouts for group in batches.figures.kept)
        fits["count"] += kept
        return not kept or fits["count"] == 1

    batches._fits = first_of_the_kept
    found = [next(batches) for _ in range(3)]
    assert batches.figures.left_out == 4 * len(batches.figures.kept) - 1
    learnt = [batch["advantages"][batch["labels"] != IGNORE].abs().sum().item() for batch in found]
    assert learnt[0] > 0
    assert learnt[1:] == [0, 0]


def test_tasks_out_of_reach_are_told():
    class Never(Parity):
        def grade(self, item: Item, reply: str) -> float:
            return 0.0

    config = OnlineConfig(prompts=2, samples=2, max_tokens=2, length=64)
    batches = Online(new_lm(), [(Never(), 1.0)], config, PolicyConfig(), FilterConfig(), pool=8)
    with pytest.raises(DataError, match="never did grades differ"):
        next(batches)
    with pytest.raises(DataError, match=r"0 of 4 rollouts can be trained on, .*max-tokens"):
        next(Online(new_lm(), [(Parity(), 1.0)], config, PolicyConfig(), None, pool=8))


@pytest.mark.parametrize("updates", [1, 2])
def test_a_place_that_is_restored_gives_the_same_batches(updates):
    one = online(new_lm(), FilterConfig(), updates=updates)
    first = [next(one) for _ in range(3)]
    state = one.state_dict()
    rest = [next(one) for _ in range(3)]
    other = online(new_lm(), FilterConfig(), updates=updates)
    other.load_state_dict(state)
    same(rest, [next(other) for _ in range(3)])
    again = online(new_lm(), FilterConfig(), updates=updates)
    same(first, [next(again) for _ in range(3)])
    assert ("old_logprobs" in first[0]) == (updates > 1)
    assert len(state["pending"]) == (1 if updates > 1 else 0)


def test_old_log_probs_are_the_trainers_at_the_time_of_playing():
    lm = new_lm()
    batches = online(lm, updates=2)
    batch = next(batches)
    learnt = batch["labels"] != IGNORE
    torch.testing.assert_close(
        batch["old_logprobs"][learnt], batch["sampler_logprobs"][learnt], atol=1e-4, rtol=0
    )
    _, numbers = PolicyLoss(PolicyConfig())(lm.model, batch)
    assert numbers["clipped"][0] == 0


def test_a_low_precision_sampler_follows_the_trainer():
    lm = new_lm()
    sampler = LM(copy.deepcopy(lm.model).to(torch.bfloat16), lm.tokenizer)
    config = OnlineConfig(prompts=2, samples=2, max_tokens=3, length=64)
    batches = Online(sampler, [(Parity(), 1.0)], config, PolicyConfig(mask_truncated=False), None, pool=8, trainer=lm.model)  # fmt: skip
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1.5)
    next(batches)
    assert torch.equal(sampler.model.lm_head.weight, lm.model.lm_head.weight.bfloat16())


def test_a_reference_is_needed_for_kl_and_then_used():
    lm = new_lm()
    policy = PolicyConfig(kl=0.1, mask_truncated=False)
    config = OnlineConfig(prompts=2, samples=2, max_tokens=3, length=64)
    with pytest.raises(ConfigError, match=r"policy.kl is 0.1"):
        Online(lm, [(Parity(), 1.0)], config, policy, None, pool=8)
    reference = new_lm(seed=5).model
    batches = Online(lm, [(Parity(), 1.0)], config, policy, None, pool=8, reference=reference)
    batch = next(batches)
    _, numbers = PolicyLoss(policy)(lm.model, batch)
    assert numbers["kl"][0] > 0
    assert not torch.equal(batch["reference_logprobs"], batch["sampler_logprobs"])


@pytest.mark.parametrize("implementation", ["fused", "loop"])
def test_the_engine_notices_that_the_loop_moved_the_weights(tmp_path, implementation):
    """What it kept for reuse is void; torch's fused AdamW alone would not tell it."""
    lm = new_lm()
    request = lm.request("x" * 60, max_tokens=4)
    before = lm.engine.run([request])[0]
    assert lm.engine.run([request])[0].cached_tokens > 0
    ids = torch.randint(0, 250, (2, 16))
    batch = {"input_ids": ids, "labels": ids}

    class Same:
        def __iter__(self):
            return self

        def __next__(self):
            return batch

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    optimizer = adamw.build(
        lm.model, AdamWConfig(learning_rate=0.05, implementation=implementation)
    )
    fit(lm.model, optimizer, Same(), next_token, schedule=lambda *_: 1.0, steps=2,
        accelerator=make_accelerator(cpu=True), state=State(tmp_path, show=False))  # fmt: skip
    after = lm.engine.run([request])[0]
    assert after.cached_tokens == 0
    assert after.ids != before.ids
    fresh = LM(lm.model, lm.tokenizer).engine.run([request])[0]
    assert after.ids == fresh.ids
    assert after.logprobs == fresh.logprobs


def test_refusals():
    for name in ("prompts", "updates", "max_tokens", "turns"):
        with pytest.raises(ConfigError, match=f"online.{name} is 0"):
            OnlineConfig(**{name: 0})
    with pytest.raises(ConfigError, match="samples is 1; it must be at least 2"):
        OnlineConfig(samples=1)
    twice = [(Parity(), 1.0), (Parity(), 2.0)]
    with pytest.raises(ConfigError, match="tasks parity, parity: each may be named once"):
        Online(new_lm(), twice, OnlineConfig(), PolicyConfig(), None)
