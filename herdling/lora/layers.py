"""Layers with low-rank changes, in the place of the plain ones and under their names.

An adapted module is the same object with another class: its own parameters keep their names, hooks
and references to it stay, and what was `X.q_proj.weight` still is; beside it stand
`X.q_proj.lora.0.A` and `.B`, one number for each adapter. Which adapter a token uses is asked of
`choice` at each call.

What lies below may itself be no plain layer (quantized, or rounded in training): `adapted` makes a
class over any kind of linear and experts, whose plain result is that kind's own.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.errors import Error, InputError
from herdling.lora.grouped import Part, adapted_experts
from herdling.model.llama import Experts, Router

if TYPE_CHECKING:
    from herdling.lora.adapters import Adapters


class Factors(nn.Module):
    """A low-rank change of one matrix: scale * B A, or scale * A[e] B[e] for fused experts.

    Of a linear: A (r, in), B (out, r), in the layout of `nn.Linear`. Of experts: A (E, in, r) and
    B (E, r, out), in theirs. DoRA adds `magnitude` (out,), the length of each row of the result.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        alpha: float,
        rslora: bool = False,
        magnitude: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.rslora = alpha, rslora
        self.scale = alpha / (math.sqrt(self.r) if rslora else self.r)

    @property
    def r(self) -> int:
        return self.A.shape[2] if self.A.dim() == 3 else self.A.shape[0]

    def delta(self, x: Tensor, out: Tensor, layer: "LoraLinear") -> Tensor:
        """What `layer` adds to its plain result: x (..., in), out (..., out) -> (..., out)."""
        change = F.linear(F.linear(x.to(self.A.dtype), self.A) * self.scale, self.B)
        if self.magnitude is None:
            return change.to(out.dtype)
        gain = self.gain(layer.base).to(out.dtype)
        plain = out if layer.bias is None else out - layer.bias.to(out.dtype)
        return (gain - 1) * plain + gain * change.to(out.dtype)

    def gain(self, weight: Tensor) -> Tensor:
        """(out,): magnitude over row length of the changed weight, the length as a constant (DoRA 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            length = torch.linalg.vector_norm(weight + self.change().to(weight.dtype), dim=1)
            length.masked_fill_(length == 0, 1)  # a row of zeros has no direction, and stays one
        return self.magnitude / length

    def change(self) -> Tensor:
        """The change itself, in the layout of the weight."""
        product = self.A @ self.B if self.A.dim() == 3 else self.B @ self.A
        return product * self.scale

    def changed(self, weight: Tensor) -> Tensor:
        """The weight in effect, in float32 at least."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        out = wide + self.change().to(wide.dtype)
        return out if self.magnitude is None else self.gain(wide)[:, None] * out


class LoraLinear(nn.Linear):
    """W x + b + scale * B (A x), for the tokens whose adapter reaches this layer."""

    lora: nn.ModuleDict
    choice: "Adapters"
    over: type[nn.Module] = nn.Linear
    """The class of the layer without adapters."""
    pictures: bool = False
    """Whether it takes patches of pictures, which are not the tokens that adapters are chosen for."""

    def plain(self, x: Tensor) -> Tensor:
        """The result without any adapter; another kernel may be put in its place."""
        return F.linear(x, self.base, self.bias)

    @property
    def base(self) -> Tensor:
        """The weight without any adapter."""
        own = getattr(self.over, "weight", None)
        if isinstance(own, property) and own.fget is not None:
            weight = own.fget(self)
        else:
            weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = self.plain(x)
        for key, rows in self.choice.active:
            if key not in self.lora:
                continue
            factors = self.lora[key]
            assert isinstance(factors, Factors)
            if rows is None:
                out = out + factors.delta(x, out, self)
            elif self.pictures:
                raise InputError(
                    "pictures are encoded for one adapter at a time; remedy: encode them before, "
                    "or one call for each adapter"
                )
            else:
                flat = out.flatten(0, -2)
                self.choice.check_tokens(len(flat))
                mine = (t.flatten(0, -2).index_select(0, rows) for t in (x, out))
                out = flat.index_add(0, rows, factors.delta(*mine, self)).view_as(out)
        return out


class LoraHead(LoraLinear):
    """The output head, whose `weight` is the one in effect: losses multiply by it themselves.

    In training its gradient is as large as the head for a moment, before it becomes that of factors.
    """

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        weight = self.base
        for key, rows in self.choice.active:
            if key not in self.lora:
                continue
            if rows is not None:
                raise Error("the head's weight differs from token to token; call the head instead")
            factors = self.lora[key]
            assert isinstance(factors, Factors)
            return factors.changed(weight).to(weight.dtype)
        return weight


class LoraRouter(Router, LoraLinear):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A router whose logits come from the adapted linear (next in line after `Router`)."""

    over = Router


class LoraExperts(Experts):
    """Routed experts; `lora.0` holds the factors of `gate_up_proj`, of `down_proj`, or both.

    Tokens without an adapter go the plain way, those with one together through `adapted_experts`.
    """

    lora: nn.ModuleDict
    choice: "Adapters"
    over: type[nn.Module] = Experts

    def plain(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The result without any adapter; another kernel may be put in its place."""
        return super().forward(x, chosen, gates)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        active = self.choice.active
        parts = [(dict(self.lora[key].items()), rows) for key, rows in active if key in self.lora]  # pyright: ignore[reportCallIssue]
        if not parts:
            return self.plain(x, chosen, gates)
        tokens = [rows for _, rows in parts if rows is not None]
        if len(tokens) < len(parts):  # one adapter for all
            return self._changed(x, chosen, gates, parts)
        self.choice.check_tokens(x.shape[0])
        mine = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        mine[torch.cat(tokens)] = True
        place = mine.cumsum(0) - 1  # of an adapted token among its like
        among = [(own, place.index_select(0, rows)) for own, rows in parts if rows is not None]
        rest, adapted = (mask.nonzero().squeeze(1) for mask in (~mine, mine))
        x_own, chosen_own, gates_own = (t.index_select(0, adapted) for t in (x, chosen, gates))
        changed = self._changed(x_own, chosen_own, gates_own, among)
        if not len(rest):
            return changed
        plain = self.plain(*(t.index_select(0, rest) for t in (x, chosen, gates)))
        out = torch.cat([changed, plain.to(changed.dtype)])
        return out.index_select(0, torch.cat([adapted, rest]).argsort())

    def _changed(self, x: Tensor, chosen: Tensor, gates: Tensor, parts: Sequence[Part]) -> Tensor:
        # Experts that are not plain say themselves what a product with a tensor of theirs is.
        product = getattr(self, "product", None)
        up, down = self.gate_up_proj, self.down_proj
        return adapted_experts(x, chosen, gates, up, down, parts, product)


@lru_cache
def adapted(kind: type[nn.Module], head: bool = False) -> type[nn.Module] | None:
    """The class of a layer of class `kind` that takes adapters; None where there can be none."""
    plain = {nn.Linear: LoraHead if head else LoraLinear, Router: LoraRouter, Experts: LoraExperts}
    if kind in plain:
        return plain[kind]
    if issubclass(kind, Experts):
        return type(f"Lora{kind.__name__}", (LoraExperts, kind), {"over": kind})
    if not issubclass(kind, nn.Linear) or issubclass(kind, Router | LoraLinear):
        return None
    # A kind that multiplies in the usual way, by a weight of its own, is served by `base`.
    own = {} if kind.forward is nn.Linear.forward else {"plain": kind.forward}
    bases = (LoraHead if head else LoraLinear, kind)
    return type(f"Lora{kind.__name__}", bases, {"over": kind, **own})
