"""Play tasks with the engine: prompts in, graded conversations out.

    rollouts = play(lm, [Game(task, task.item(0, "train"), seed=s) for s in range(8)], temperature=1.0)
    rollouts[0].grade, rollouts[0].ids, rollouts[0].written

All games run at once, each at its own turn, so the engine's batch stays full; equal beginnings are
computed once. A game goes on from the very tokens that were sampled, never from their text: what is
trained on later is what was read. Where a reply calls tools and the task answers calls, the answers
are appended and it is the model's turn again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from herdling.errors import ConfigError
from herdling.infer.lm import LM
from herdling.infer.request import Completion, Request
from herdling.infer.sampling import Sampling
from herdling.inputs import chat
from herdling.rollouts.rollout import Rollout
from herdling.tasks.base import Item, MultiTurn, Task


@dataclass(frozen=True, eq=False)
class Game:
    """One item to be played once."""

    task: Task
    item: Item
    seed: int = 0
    """Decides what is drawn; the same game gives the same rollout whatever else is played."""


def play(
    lm: LM,
    games: Sequence[Game],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    turns: int = 4,
    dialect: str = "pythonic",
    experts: bool = False,
    adapter: str | None = None,
) -> list[Rollout]:
    """The rollouts, in the order of the games.

    Args:
        max_tokens: most tokens of each turn of the model.
        temperature: 0 takes the likeliest token.
        turns: how often it may be the model's turn; a call of tools in the last one counts as its reply.
        dialect: how the model is told to write tool calls; replies are read in any dialect.
        experts: also report the experts that every token went to.
        adapter: name of a loaded adapter that plays; None for the plain model.

    Raises InputError where the model cannot take an item (pictures for a text-only one). The engine
    must have nothing else to do.
    """
    for name, value in (("max_tokens", max_tokens), ("turns", turns)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    # A patch token without its picture could be neither trained on nor read in the next turn.
    never = {lm.config.image_token_index: -100.0} if lm.config.vision else {}
    asked = Request((), max_tokens=max_tokens, stop_ids=tuple(lm.tokenizer.stop_ids),
                    sampling=Sampling(temperature=temperature, logit_bias=never),
                    want_experts=experts, adapter=adapter)  # fmt: skip
    played = [_Played(lm, game, asked, turns, dialect) for game in games]
    for one in played:  # all that cannot be taken is told before anything runs
        lm.engine.check(one.request())
    waiting: dict[int, _Played] = {}
    try:
        for one in played:
            waiting[lm.engine.add(one.request())] = one
        while waiting:
            for event in lm.engine.step():
                if event.error is not None:
                    raise event.error
                if event.completion is not None:
                    one = waiting.pop(event.index)
                    if one.goes_on(event.completion):
                        waiting[lm.engine.add(one.request())] = one
    finally:
        for index in waiting:
            lm.engine.cancel(index)
        if waiting:
            lm.engine.step()
    return [one.rollout() for one in played]


class _Played:
    """A game under way."""

    def __init__(self, lm: LM, game: Game, asked: Request, turns: int, dialect: str) -> None:
        self.lm, self.game, self.asked, self.most = lm, game, asked, turns
        item = game.item
        rendered = lm.render(item.messages, item.tools or None, dialect)
        self.tiles: Tensor | None = None
        if rendered.tiles:
            self.tiles = torch.cat([image.pixel_values for image in rendered.tiles])
        self.ids = list(rendered.ids)
        self.written = [False] * len(self.ids)
        self.logprobs = [0.0] * len(self.ids)
        self.experts: list[Tensor] = []
        self.messages: list[dict[str, Any]] = list(item.messages)
        self.reply = ""
        self.turn = 0
        self.truncated = False

    def request(self) -> Request:
        seed = _seed(self.game.seed, self.turn)
        return replace(self.asked, ids=tuple(self.ids), tiles=self.tiles, seed=seed)

    def goes_on(self, completion: Completion) -> bool:
        """Take the model's turn; whether there is another one, for which the prompt is then ready."""
        self.turn += 1
        if completion.experts is not None:  # of earlier tokens, those of the time they were sampled
            known = sum(len(part) for part in self.experts)
            self.experts.append(completion.experts[known:])
        self.ids += completion.ids
        self.written += [True] * len(completion.ids)
        self.logprobs += completion.logprobs
        self.reply = completion.text
        self.truncated = completion.finish_reason != "stop"
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        task, item = self.game.task, self.game.item
        if not (item.tools and isinstance(task, MultiTurn)) or self.truncated:
            self.messages.append(message)
            return False
        message = chat.parse(completion.ids, self.lm.tokenizer)
        self.messages.append(message)
        if not message["tool_calls"]:
            return False
        self.truncated = self.turn == self.most
        return not self.truncated and self._add(task.respond(item, self.messages))

    def _add(self, said: list[dict[str, Any]]) -> bool:
        """Append what the tools said and open the reply; whether there is room for one."""
        added = chat.render(said, self.lm.tokenizer).ids[1:]  # begin_of_text stands there already
        if len(self.ids) + len(added) + 1 > self.lm.config.text.max_position_embeddings:
            self.truncated = True
            return False
        self.messages += said
        self.ids += added
        self.written += [False] * len(added)
        self.logprobs += [0.0] * len(added)
        return True

    def rollout(self) -> Rollout:
        game = self.game
        return Rollout(
            item=game.item,
            messages=self.messages,
            reply=self.reply,
            grade=game.task.grade(game.item, self.reply),
            ids=self.ids,
            written=self.written,
            logprobs=self.logprobs,
            tiles=self.tiles,
            experts=torch.cat(self.experts) if self.experts else None,
            truncated=self.truncated,
            turns=self.turn,
        )


def _seed(seed: int, turn: int) -> int:
    """Another one for each turn; the first turn's is the game's own."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
