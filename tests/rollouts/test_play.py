"""Games are played token by token: what is read, written, drawn and graded is exactly known."""

import dataclasses

import pytest
import torch

from herdling.errors import ConfigError, InputError
from herdling.inputs import chat
from herdling.model.llama import Router
from herdling.rollouts.play import Game, play
from herdling.tasks.registry import create

TASKS = ("read_number", "arithmetic", "count_shapes", "calculator")


def mixed(count: int = 6) -> list[Game]:
    tasks = [create(name) for name in TASKS]
    games = [(tasks[i % len(tasks)], i) for i in range(count)]
    return [Game(task, task.item(i, "train"), seed=100 + i) for task, i in games]


def same(one, other) -> bool:
    return (one.ids, one.written, one.reply, one.grade) == (
        other.ids,
        other.written,
        other.reply,
        other.grade,
    )


@pytest.fixture(scope="module")
def played(lm):
    return play(lm, mixed(), max_tokens=6, temperature=1.0, experts=True)


def test_a_rollout_holds_prompt_and_reply_with_their_log_probs(lm, played):
    for game, one in zip(mixed(), played, strict=True):
        prompt = lm.render(game.item.messages, game.item.tools)
        n = len(prompt.ids)
        assert one.ids[:n] == prompt.ids
        assert one.written == [False] * n + [True] * (len(one.ids) - n)
        assert lm.tokenizer.patch not in one.ids[n:]
        assert 1 <= one.length <= 6
        assert one.turns == 1
        assert one.truncated == (one.ids[-1] not in lm.tokenizer.stop_ids)
        assert one.grade == game.task.grade(game.item, one.reply)
        assert one.messages[-1]["role"] == "assistant"
        logits = lm.logits([one.ids], one.tiles)[0, :-1].log_softmax(-1)
        want = logits.gather(1, torch.tensor(one.ids)[1:, None])[:, 0]
        got = torch.tensor(one.logprobs)[1:]
        drawn = torch.tensor(one.written)[1:]
        torch.testing.assert_close(got[drawn], want[drawn], atol=1e-4, rtol=0)
        assert not got[~drawn].any()


def test_experts_are_those_of_the_plain_forward(lm, played):
    chosen: list[torch.Tensor] = []
    routers = [m for m in lm.model.modules() if isinstance(m, Router)]
    hooks = [r.register_forward_hook(lambda _, __, out: chosen.append(out[0])) for r in routers]
    wanted = []
    for one in played:
        chosen.clear()
        lm.logits([one.ids[:-1]], one.tiles)
        wanted.append(torch.stack(chosen, 1))
    for hook in hooks:
        hook.remove()
    for one, want in zip(played, wanted, strict=True):
        assert torch.equal(one.experts.long(), want)


def test_a_game_is_the_same_whatever_else_is_played(lm, played):
    for game, one in zip(mixed(), played, strict=True):
        [alone] = play(lm, [game], max_tokens=6, temperature=1.0, experts=True)
        assert same(one, alone)
        assert torch.equal(one.experts, alone.experts)
    again = play(lm, mixed()[::-1], max_tokens=6, temperature=1.0)
    assert all(same(a, b) for a, b in zip(again[::-1], played, strict=True))
    assert again[0].experts is None


def test_seeds_tell_samples_of_one_prompt_apart(lm):
    game = mixed()[1]
    games = [dataclasses.replace(game, seed=seed) for seed in range(8)]
    replies = [tuple(r.ids) for r in play(lm, games, max_tokens=6, temperature=1.0)]
    assert len(set(replies)) == 8
    greedy = play(lm, games, max_tokens=6)
    assert len({tuple(r.ids) for r in greedy}) == 1


@pytest.mark.parametrize("dialect", ["pythonic", "json"])
def test_reference_turns_give_the_ids_and_mask_of_the_rendered_conversation(lm, scripted, dialect):
    task = create("calculator")
    items = [task.item(i, "train") for i in range(3)]
    scripts, wants = [], []
    for item in items:
        rendered = chat.render(item.conversation(), lm.tokenizer, item.tools, False, dialect)
        written = lm.tokenizer.decode(
            t for t, mine in zip(rendered.ids, rendered.loss_mask, strict=True) if mine
        )
        call, answer = written.split("<|eom|>")
        scripts.append([f"{call}<|eom|>", answer])
        wants.append(rendered)
    scripted(lm, scripts)
    for one, item, want in zip(
        play(lm, [Game(task, item) for item in items], dialect=dialect), items, wants, strict=True
    ):
        assert one.ids == want.ids
        assert one.written == want.loss_mask
        assert [logprob < 0 for logprob in one.logprobs] == want.loss_mask
        assert one.grade == 1.0
        assert one.turns == 2
        assert not one.truncated
        assert [m["role"] for m in one.messages] == ["user", "assistant", "tool", "assistant"]
        assert one.messages[2] == item.turns[1]


def test_what_was_sampled_is_kept_even_where_it_is_written_oddly(lm, scripted):
    task = create("calculator")
    item = task.item(0, "train")
    engine = scripted(lm, [["[calc( x = '1+1')]<|eot|>", "[calc(y=1)]<|eom|>", "2<|eot|>"]])
    [one] = play(lm, [Game(task, item, seed=7)])
    assert one.turns == 3
    assert [m["content"] for m in one.messages if m["role"] == "tool"] == [
        "2",
        "error: calc takes x",
    ]
    text = lm.tokenizer.decode(one.ids)
    assert "[calc( x = '1+1')]<|eot|><|header_start|>ipython<|header_end|>\n\n2<|eom|>" in text
    assert one.reply == "2"
    assert one.grade == task.grade(item, "2")
    assert len({request.seed for request in engine.requests}) == 3
    assert engine.requests[0].seed == 7
    for before, after in zip(engine.requests, engine.requests[1:], strict=False):
        assert after.ids[: len(before.ids)] == before.ids


def test_a_game_that_never_answers_ends_truncated(lm, scripted):
    task = create("calculator")
    scripted(lm, [["[calc(x='1')]<|eom|>"] * 2])
    [one] = play(lm, [Game(task, task.item(0, "train"))], turns=2)
    assert (one.turns, one.truncated, one.grade) == (2, True, 0.0)
    assert one.messages[-1]["role"] == "assistant"
    scripted(lm, [["[calc(x='1')]"]])  # cut short inside a turn: the call is not carried out
    [one] = play(lm, [Game(task, task.item(0, "train"))])
    assert (one.turns, one.truncated) == (1, True)


def test_a_context_that_is_full_ends_the_game(make_lm, scripted):
    task = create("calculator")
    item = task.item(0, "train")
    lm = make_lm(vision=False)
    prompt = len(lm.render(item.messages, item.tools).ids)
    small = make_lm(vision=False, max_position_embeddings=prompt + 12)
    scripted(small, [["[calc(x='1')]<|eom|>"]])
    [one] = play(small, [Game(task, item)])
    assert (one.turns, one.truncated) == (1, True)
    assert one.messages[-1]["role"] == "assistant"


def test_tools_are_called_only_where_the_task_has_them(lm, scripted):
    task = create("arithmetic")
    scripted(lm, [["[calc(x='1')]<|eom|>"]])
    [one] = play(lm, [Game(task, task.item(0, "train"))])
    assert (one.turns, one.truncated) == (1, False)
    assert one.reply == "[calc(x='1')]"


def test_refusals_leave_the_engine_idle(lm, make_lm):
    with pytest.raises(ConfigError, match="turns is 0"):
        play(lm, mixed(), turns=0)
    blind = make_lm(vision=False)
    with pytest.raises(InputError, match="image"):
        play(blind, mixed())
    assert not blind.engine.busy


def test_an_error_on_the_way_leaves_the_engine_idle(lm, monkeypatch):
    task = create("arithmetic")
    games = [Game(task, task.item(i, "train")) for i in range(3)]
    taken = []

    def grade_badly(*_):
        taken.append(1)
        raise RuntimeError("the reader is ill")

    from herdling.rollouts import play as module

    monkeypatch.setattr(module._Played, "goes_on", grade_badly)
    with pytest.raises(RuntimeError, match="ill"):
        play(lm, games, max_tokens=3)
    assert not lm.engine.busy
    monkeypatch.undo()
    assert play(lm, games[:1], max_tokens=3)[0].turns == 1
