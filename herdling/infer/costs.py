"""What speculation costs and brings, before anybody builds it: bytes read, experts touched, speed-up.

    costs = predict(target, draft_cost=0.2, longest=8, width=2)
    costs.speedup(acceptance=0.8, drafted=4), costs.best(0.8)

Decoding one sequence is bound by the bytes it reads. Checking g drafted tokens reads attention, shared
experts and head once, as one token does, but the routed experts that all g + 1 tokens chose. Computing
is taken to be free, which holds up to some tens of tokens.
Sources: arXiv 2211.17192 (the speed-up), 2506.20675 (MoE models pay more for verification).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from herdling.errors import ConfigError
from herdling.model.config import ModelConfig


def distinct_experts(
    experts: int, tokens: int, chosen: int = 1, shares: Sequence[float] | None = None
) -> float:
    """Experts of a layer that some of `tokens` tokens chose, expected.

    Each token takes `chosen` different experts, independently of the others. With even load this is
    E (1 - (1 - k/E)^n); `shares`, the probability that a token takes an expert (they sum to
    `chosen`), is for load that is not.
    """
    if shares is None:
        shares = [chosen / max(1, experts)] * experts
    return sum(1 - (1 - share) ** tokens for share in shares)


def step_bytes(
    config: ModelConfig,
    tokens: int = 1,
    *,
    width: float = 4,
    expert_width: float | None = None,
    position: int = 0,
    routed: bool = True,
    distinct: float | None = None,
) -> float:
    """Bytes of weights and cache that a pass over `tokens` new tokens of one sequence reads.

    Args:
        width: bytes of a weight: 4 for float32, 2 for bfloat16.
        expert_width: of the routed experts' weights, where it differs (0.5 for int4).
        position: tokens read before, whose keys and values (of `width` bytes) are read.
        routed: False for the pass of `SharedExpertDraft`.
        distinct: experts touched a layer, where it was measured.
    """
    text = config.text
    D, d, KV = text.hidden_size, text.head_dim, text.num_key_value_heads
    if distinct is None:
        experts, chosen = text.num_local_experts, text.num_experts_per_tok
        distinct = distinct_experts(experts, tokens, chosen)
    attention = 2 * D * d * (text.num_attention_heads + KV)
    weights = text.vocab_size * D + D + tokens * D  # head, last norm, rows of the embedding
    experts = 0.0
    for layer in range(text.num_hidden_layers):
        weights += attention + 2 * D
        if not text.is_moe(layer):
            weights += 3 * D * text.intermediate_size_mlp
        else:
            weights += 3 * D * text.intermediate_size
            if routed:
                weights += D * text.num_local_experts
                experts += 3 * D * text.intermediate_size * distinct
        chunk = text.attention_chunk_size if text.is_local(layer) else None
        weights += 2 * KV * d * (position % chunk if chunk else position)
    return weights * width + experts * (width if expert_width is None else expert_width)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens of one verification: (1 - a^(g+1)) / (1 - a)."""
    return sum(acceptance**i for i in range(drafted + 1))


@dataclass(frozen=True)
class Costs:
    """Times in units of the target's step for one token."""

    draft: float
    """A drafted token."""
    verify: tuple[float, ...]
    """The target's pass over g drafted tokens and one more, for g = 0 (that is 1), 1, 2, ..."""

    def __post_init__(self) -> None:
        if self.draft < 0 or not self.verify or min(self.verify) <= 0:
            raise ConfigError(
                f"draft cost {self.draft} and verification costs {self.verify}; times must be above 0"
            )

    @property
    def longest(self) -> int:
        """Most tokens that may be drafted."""
        return len(self.verify) - 1

    def speedup(self, acceptance: float, drafted: int) -> float:
        """Tokens per unit of time, where decoding without a draft makes 1."""
        time = drafted * self.draft + self.verify[drafted] / self.verify[0]
        return expected_tokens(acceptance, drafted) / time

    def best(self, acceptance: float) -> int:
        """The number of drafted tokens that is fastest; 0 where none helps."""
        return max(range(len(self.verify)), key=lambda g: self.speedup(acceptance, g))


def draft_cost(draft: ModelConfig, target: ModelConfig, routed: bool = True) -> float:
    """A draft's step over the target's, by the weights that one token reads."""
    return step_bytes(draft, routed=routed) / step_bytes(target)


def predict(
    target: ModelConfig,
    draft_cost: float,
    longest: int = 8,
    *,
    width: float = 4,
    expert_width: float | None = None,
    position: int = 0,
    latency: float = 0,
) -> Costs:
    """Costs by bytes. `latency` is what a step of the target takes however little it reads, in bytes
    that could be read in that time; drafts, several steps of which are one call, have none.
    """

    def step(tokens: int) -> float:
        return step_bytes(target, tokens, width=width, expert_width=expert_width, position=position)

    first = step(1) + latency
    verify = tuple((step(g + 1) + latency) / first for g in range(longest + 1))
    return Costs(draft_cost * step(1) / first, verify)
