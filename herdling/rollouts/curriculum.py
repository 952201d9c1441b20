"""Which prompts to play next: those that the present policy finds medium to hard.

    curriculum = Curriculum(prompts, FilterConfig())
    chosen = curriculum.draw(8, step=0)             # numbers of prompts
    curriculum.record(chosen[0], grades=[0, 1, 0, 0], step=0)

A group of rollouts teaches something only if its grades differ, and most where about half of them are
right: gradient energy goes as p (1 - p) of the pass rate p. So each prompt's pass rate is estimated
from the grades that it got, as far as they are recent, and for the rest from those of its class (task
and difficulty); prompts are drawn in proportion to p (1 - p), or a floor where that is small or p is
above `easiest`, within their class. Each class keeps its share of what is asked unless it is solved or
out of reach: where a class stands for an answer (pictures of six things), one that is asked too rarely
is unlearnt in favour of its neighbours (docs/log.md). As the policy learns the estimates move, and what was too hard comes due; what has not
been asked for long counts as unknown again, and the floor asks for everything now and then. Balanced
online filtering: arXiv 2504.03380.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from herdling.errors import ConfigError
from herdling.rollouts.config import FilterConfig

_FULL = 0.05
"""Mean p (1 - p) of a class from which on it has its whole share: pass rates of 5 to 95 %."""


class Curriculum:
    """The record of a pool of prompts, and draws from it. With `config` None all are alike."""

    def __init__(
        self,
        classes: Sequence[Hashable],
        config: FilterConfig | None,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            classes: of each prompt, what it may share its unknown pass rate with.
            weights: of each prompt, a factor on how often it is drawn.
        """
        if not classes:
            raise ConfigError("the curriculum has no prompts")
        self.config, self.seed = config, seed
        names = list(dict.fromkeys(classes))
        self._class = np.array([names.index(name) for name in classes])
        self._weights = np.ones(len(classes)) if weights is None else np.array(weights, dtype=float)
        self._right, self._tries = np.zeros(len(classes)), np.zeros(len(classes))
        self._seen = np.zeros(len(classes))
        """The step at which the two counts above were true; they fade from then on."""

    def __len__(self) -> int:
        return len(self._class)

    def pass_rates(self, step: int) -> np.ndarray:
        """Estimated pass rate of every prompt (n,) at a step."""
        if self.config is None:
            return np.full(len(self), 0.5)
        fade = 0.5 ** ((step - self._seen) / self.config.memory)
        right, tries = self._right * fade, self._tries * fade
        of_class = np.bincount(self._class, right), np.bincount(self._class, tries)
        # A class of which nothing is known is as good as half right: worth asking.
        expected = ((of_class[0] + 0.5) / (of_class[1] + 1))[self._class]
        return (right + self.config.prior * expected) / (tries + self.config.prior)

    def weights(self, step: int) -> np.ndarray:
        """How often each prompt is drawn (n,), relative to the others."""
        if self.config is None:
            return self._weights
        p = self.pass_rates(step)
        energy = np.where(p <= self.config.easiest, p * (1 - p), 0.0)
        own = self._weights * np.maximum(energy, self.config.floor)
        share = np.bincount(self._class, self._weights)
        mean = np.bincount(self._class, self._weights * p * (1 - p)) / share
        share *= np.clip(mean / _FULL, self.config.floor, 1.0)
        return own * (share / np.bincount(self._class, own))[self._class]

    def draw(self, count: int, step: int, wave: int = 0, without: Sequence[int] = ()) -> list[int]:
        """Different prompts, as many as there are; a pure function of the record and the arguments.

        `wave` tells draws of one step apart, `without` what it has drawn already.
        """
        weights = self.weights(step).copy()
        weights[list(without)] = 0.0
        random = np.random.default_rng([self.seed, step, wave]).random(len(self))
        # The largest u^(1/w) are a draw without replacement (Efraimidis and Spirakis, 2006).
        with np.errstate(divide="ignore"):
            keys = np.where(weights > 0, np.log(random) / weights, -math.inf)
        order = np.argsort(-keys, kind="stable")[:count]
        return [int(i) for i in order if weights[i] > 0]

    def record(self, prompt: int, grades: Sequence[float], step: int) -> None:
        """Take note of a prompt's grades under the policy of a step."""
        if self.config is None:
            return
        fade = 0.5 ** ((step - self._seen[prompt]) / self.config.memory)
        self._right[prompt] = self._right[prompt] * fade + sum(grades)
        self._tries[prompt] = self._tries[prompt] * fade + len(grades)
        self._seen[prompt] = step

    def state_dict(self) -> dict[str, Any]:
        """The record."""
        columns = np.stack([self._right, self._tries, self._seen])
        return {"record": torch.from_numpy(columns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        record = state["record"].numpy()
        if record.shape[1] != len(self):
            raise ConfigError(
                f"the checkpoint's curriculum has {record.shape[1]} prompts, this one {len(self)}"
            )
        self._right, self._tries, self._seen = (row.copy() for row in record)
