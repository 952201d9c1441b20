"""One conversation that a model played, token by token, and groups of them for one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from herdling.tasks.base import Item


@dataclass(frozen=True, eq=False)
class Rollout:
    """A played item: what the model read and wrote, exactly, and what it was worth.

    Shape letters: T tokens of the whole conversation, L MoE layers, k experts a token.
    """

    item: Item
    messages: list[dict[str, Any]]
    """The item's messages, the model's turns and what tools said."""
    reply: str
    """Text of the last turn, which was graded."""
    grade: float
    """0 to 1."""
    ids: list[int]
    """(T) the prompt, every token as it was sampled, and the tools' messages between them."""
    written: list[bool]
    """(T) True for the tokens that the model wrote, those that end its turns included."""
    logprobs: list[float]
    """(T) log-prob of each written token when it was sampled, from the raw logits; 0 elsewhere."""
    tiles: Tensor | None
    """(n, 3, S, S) float32: the images of `ids`."""
    experts: Tensor | None
    """(T - 1, L, k) int16, where asked for: the experts of every token that the model read."""
    truncated: bool
    """Whether it ended before the model was done: out of tokens, context or turns."""
    turns: int
    """How often it was the model's turn."""

    @property
    def length(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.written)


@dataclass(frozen=True, eq=False)
class Group:
    """Several rollouts of one prompt."""

    prompt: int
    """Whose prompt: its number in the pool it was drawn from."""
    rollouts: Sequence[Rollout]

    @property
    def grades(self) -> list[float]:
        return [rollout.grade for rollout in self.rollouts]

    @property
    def useful(self) -> bool:
        """Whether grades differ: only then does any rollout have an advantage."""
        return len(set(self.grades)) > 1
