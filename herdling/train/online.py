"""Online RL as batches for the loop: draw prompts, play them, keep what teaches, pack it.

    batches = Online(lm, tasks, OnlineConfig(), PolicyConfig(), curriculum="filtered")
    fit(model, optimizer, batches, loss, weight=loss.weight, ...)

Every optimizer step, or every `updates` of them, the present weights play: the curriculum draws
prompts, each is played `samples` times, groups whose grades are all equal are dropped and others drawn
in their place. So filtering and training alternate from step to step, and the record from which
prompts are drawn is always that of policies just behind the present one. The engine works on the very
weights in training; what it kept for reuse is dropped with each new policy.

Left out: playing while training (asynchronous RL), and several processes.
"""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from herdling import distributed
from herdling.errors import ConfigError, DataError
from herdling.infer.lm import LM
from herdling.rollouts.config import FilterConfig
from herdling.rollouts.curriculum import Curriculum
from herdling.rollouts.pack import beside, pack
from herdling.rollouts.play import Game, play
from herdling.rollouts.rollout import Group, Rollout
from herdling.tasks.base import Item, Task
from herdling.train.config import OnlineConfig, PolicyConfig
from herdling.train.loop import Batches
from herdling.train.losses import Batch
from herdling.train.policy import advantages, token_log_probs

log = logging.getLogger(__name__)

_FRUITLESS = 20
"""Waves without a single useful group after which a run does not even begin."""


@dataclass
class Figures:
    """What a batch of rollouts was like."""

    groups: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    expected: float = 0.0
    """Mean pass rate that the curriculum expected of what it drew."""
    left_out: int = 0
    """Rollouts of kept groups that were truncated or too long to train on."""
    seconds: float = 0.0


class Online:
    """Micro-batches of rollouts, without end, that can tell and restore their place."""

    def __init__(
        self,
        lm: LM,
        tasks: Sequence[tuple[Task, float]],
        online: OnlineConfig,
        policy: PolicyConfig,
        filtered: FilterConfig | None,
        *,
        pool: int = 512,
        accumulation: int = 1,
        seed: int = 0,
        trainer: nn.Module | None = None,
        reference: nn.Module | None = None,
        examples: Batches | None = None,
    ) -> None:
        """
        Args:
            lm: plays; holds the model in training, or a copy of it in another type.
            tasks: with weights, how often each is asked relative to the others.
            filtered: None asks all prompts alike and trains on every group.
            pool: prompts of each task.
            accumulation: micro-batches of an optimizer step.
            trainer: the model in training, if `lm` has a copy, which then follows it.
            examples: rows of tuning data, of `online.length` tokens; a batch of them goes beside
                every micro-batch of rollouts.
            reference: the model that `policy.kl` holds the policy to.
        """
        if distributed.world_size() > 1:
            raise ConfigError("RL runs in one process; remedy: start it without accelerate launch")
        if policy.kl > 0 and reference is None:
            raise ConfigError(f"policy.kl is {policy.kl}, but there is no reference model")
        names = [task.name for task, _ in tasks]
        if len(set(names)) < len(names):
            raise ConfigError(f"tasks {', '.join(names)}: each may be named once")
        self.lm, self.online, self.policy, self.seed = lm, online, policy, seed
        self.accumulation, self.reference, self.examples = accumulation, reference, examples
        self.trainer = lm.model if trainer is None else trainer
        self.tasks = [task for task, _ in tasks]
        self.prompts = [(t, i) for t in range(len(tasks)) for i in self._with_room(t, pool)]
        classes = [(t, round(4 * self._item(t, i).difficulty)) for t, i in self.prompts]
        self.filter = filtered
        self.curriculum = Curriculum(
            classes, filtered, weights=[tasks[t][1] for t, _ in self.prompts], seed=seed
        )
        self.figures = Figures()
        self._phase = 0
        """Batches of rollouts played so far."""
        self._played = 0
        self._numbers: dict[str, float] = {}
        self._pending: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pending:
            self._pending = self._batches(self._play())
            self._numbers = self._count()
            self._phase += 1
        return self._pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """The record of the prompts, and micro-batches of the last rollouts yet to be trained on."""
        return {
            "phase": self._phase,
            "played": self._played,
            "numbers": self._numbers,
            "curriculum": self.curriculum.state_dict(),
            "pending": [dict(batch) for batch in self._pending],
            **({} if self.examples is None else {"examples": self.examples.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._phase, self._played, self._numbers = state["phase"], state["played"], state["numbers"]
        self.curriculum.load_state_dict(state["curriculum"])
        self._pending = list(state["pending"])
        if self.examples is not None:
            self.examples.load_state_dict(state["examples"])

    def _item(self, task: int, index: int) -> Item:
        return self.tasks[task].item(index, "train")

    def _play(self) -> list[Group]:
        """Groups to train on."""
        started = time.perf_counter()
        self.figures = figures = Figures()
        if self.trainer is not self.lm.model:
            _copy_weights(self.trainer, self.lm.model)
        rates = self.curriculum.pass_rates(self._phase)
        refills = 0 if self.filter is None else self.filter.refills
        drawn: list[int] = []
        wave = 0
        while True:
            missing = self.online.prompts - len(figures.kept)
            prompts = self.curriculum.draw(missing, self._phase, wave, without=drawn)
            drawn += prompts
            groups = self._wave(prompts)
            figures.groups += groups
            figures.kept += [g for g in groups if g.useful or self.filter is None]
            wave += 1
            enough = len(figures.kept) >= self.online.prompts
            exhausted = len(drawn) == len(self.prompts)
            spent = exhausted or wave > refills
            if enough or (spent and figures.kept):
                break
            if spent and self._phase > 0:
                # Without an advantage: nothing is learnt, nothing is lost.
                figures.kept = figures.groups[-self.online.prompts :]
                break
            if self._phase == 0 and not figures.kept and (exhausted or wave >= _FRUITLESS):
                raise DataError(
                    f"{len(drawn)} prompts, {self.online.samples} rollouts each, and never did "
                    "grades differ: the tasks are solved or out of reach; remedy: other --tasks, or "
                    "more fine-tuning first"
                )
        figures.expected = float(rates[drawn].mean())
        figures.seconds = time.perf_counter() - started
        self._played += len(figures.groups) * self.online.samples
        return figures.kept

    def _wave(self, prompts: Sequence[int]) -> list[Group]:
        online = self.online
        games = []
        for prompt in prompts:
            task, index = self.prompts[prompt]
            item = self._item(task, index)
            for sample in range(online.samples):
                seed = _seed(self.seed, self._phase, prompt, sample)
                games.append(Game(self.tasks[task], item, seed))
        rollouts = play(
            self.lm, games, max_tokens=online.max_tokens, temperature=1.0, turns=online.turns, experts=True
        )  # fmt: skip
        groups = [
            Group(prompt, rollouts[i * online.samples : (i + 1) * online.samples])
            for i, prompt in enumerate(prompts)
        ]
        for group in groups:
            self.curriculum.record(group.prompt, group.grades, self._phase)
        return groups

    def _with_room(self, task: int, pool: int) -> list[int]:
        """Which of the first `pool` items of a task leave room for a reply that can be trained on."""
        room = min(self.online.length, self.lm.config.text.max_position_embeddings)
        sizes = []
        for i in range(pool):
            item = self._item(task, i)
            sizes.append(len(self.lm.render(item.messages, item.tools or None).ids))
        found = [i for i, size in enumerate(sizes) if size < room]
        name = self.tasks[task].name
        if not found:
            raise DataError(
                f"{name}: its prompts have {min(sizes)} tokens and more, which leaves no room for a "
                f"reply among {room}; remedy: a larger --online.length, or other --tasks"
            )
        if len(found) < pool:
            log.warning("%s: %d of %d prompts leave no room for a reply among %d tokens and are not "
                        "asked", name, pool - len(found), pool, room)  # fmt: skip
        return found

    def _batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The groups as `updates` times `accumulation` micro-batches."""
        found: list[tuple[Rollout, float]] = []
        for group in groups:
            values = advantages(group.grades, self.policy.scaled)
            found += zip(group.rollouts, values, strict=True)
        fits = [(one, a) for one, a in found if self._fits(one)]
        self.figures.left_out = len(found) - len(fits)
        parts = self.online.updates * self.accumulation
        if 0 < len(fits) < parts:  # each micro-batch needs one; others teach nothing
            dropped = [group for group in self.figures.groups if group not in groups]
            spare = [(one, 0.0) for group in dropped for one in group.rollouts if self._fits(one)]
            fits += spare[: parts - len(fits)]
        if len(fits) < parts:
            raise DataError(
                f"{len(fits)} of {len(found)} rollouts can be trained on, for {parts} micro-batches: "
                f"the others are truncated or longer than {self.online.length} tokens; remedy: a "
                "larger --online.max-tokens or --online.length"
            )
        batches = []
        for part in range(parts):  # dealt out, so that each has some of every group
            own = fits[part::parts]
            batch = pack([one for one, _ in own], [a for _, a in own], self.online.length, self.lm.tokenizer.pad)  # fmt: skip
            if self.online.updates > 1:
                batch["old_logprobs"] = self._log_probs(self.trainer, batch)
            if self.reference is not None:
                batch["reference_logprobs"] = self._log_probs(self.reference, batch)
            if self.examples is not None:
                batch = beside(batch, next(iter(self.examples)))
            batches.append(batch)
        return batches

    def _fits(self, rollout: Rollout) -> bool:
        cut = rollout.truncated and self.policy.mask_truncated
        return not cut and len(rollout.ids) <= self.online.length

    @torch.no_grad()
    def _log_probs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        device = self.lm.device
        return token_log_probs(model, {k: v.to(device) for k, v in batch.items()}).cpu()

    def numbers(self) -> dict[str, float]:
        """Of the last rollouts, for the metrics: rewards, shares, lengths, and difficulty by task."""
        return self._numbers

    def _count(self) -> dict[str, float]:
        figures, samples = self.figures, self.online.samples
        rollouts = [one for group in figures.groups for one in group.rollouts]
        kept = [self.prompts[group.prompt][0] for group in figures.kept]
        numbers = {
            "reward": _mean([one.grade for one in rollouts]),
            "useful_groups": _mean([group.useful for group in figures.groups]),
            "groups": len(figures.groups),
            "rollouts": self._played,
            "expected_pass_rate": figures.expected,
            "trained_pass_rate": _mean([sum(g.grades) / samples for g in figures.kept]),
            "trained_difficulty": _mean([g.rollouts[0].item.difficulty for g in figures.kept]),
            "reply_tokens": _mean([one.length for one in rollouts]),
            "turns": _mean([one.turns for one in rollouts]),
            "truncated": _mean([one.truncated for one in rollouts]),
            "left_out": figures.left_out,
        }
        for t, task in enumerate(self.tasks):
            own = [g for g in figures.groups if self.prompts[g.prompt][0] == t]
            if own:
                numbers[f"reward/{task.name}"] = _mean([sum(g.grades) / samples for g in own])
            numbers[f"share/{task.name}"] = kept.count(t) / max(1, len(kept))
        return numbers

    def speed(self) -> dict[str, float]:
        """Of the last rollouts, for the timing."""
        played = len(self.figures.groups) * self.online.samples
        return {
            "rollout_seconds": self.figures.seconds,
            "rollouts_per_second": played / max(self.figures.seconds, 1e-9),
        }


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        old.copy_(new)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _seed(*parts: int) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
