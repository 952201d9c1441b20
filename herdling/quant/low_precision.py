"""Training whose matrix products are made of few bits: weights, activations and gradients alike.

    apply(model, "fp8"); train; remove(model)

Each of the three products of a layer (its output, the gradient of its input, that of its weight) rounds
both operands along the dimension that it sums over, so a weight is rounded once along its inputs and once
more along its outputs: rounding does not commute with transposing. Weights stay float32 and keep their
names; the modules are the same objects with another class, and `remove` gives them their own back.

Embedding, head, norms, router and attention's own products stay as they are.

Recipes: `fp8`, one scale a tensor (an expert's rows and matrix are tensors), E4M3 forward and E5M2 for
gradients; `fp8_rowwise`, E4M3 with a scale for each row of an operand, the weight's gradient not rounded;
MX (arXiv 2310.10537) with a scale for each 32 numbers. Scales are made anew for each product and, of
FP8, powers of two. On a GPU the two FP8 recipes run on its FP8 units; all else, and everything on a CPU,
is emulated: the operands are rounded exactly and multiplied as floats.

Shape letters: M rows, K what a product sums over, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.kernels.grouped_matmul import Groups, Span, autocast
from herdling.model.llama import Experts
from herdling.model.sites import select
from herdling.quant.experts import StepwiseExperts
from herdling.quant.formats import Format, format_of, round_trip
from herdling.quant.schemes import PRODUCTS


@dataclass(frozen=True)
class Recipe:
    """How the operands of a layer's products are rounded."""

    name: str
    weights: Format
    inputs: Format
    gradients: Format
    exact_weight_gradient: bool = False
    """Leave the product that gives the weight's gradient as it is."""


def _fp8(name: str, per: str) -> Format:
    return format_of(name, per=per, powers_of_two=True)


def _mx(name: str, weights: str, others: str) -> Recipe:
    return Recipe(name, format_of(weights), format_of(others), format_of(others))


_TENSOR, _ROW = _fp8("fp8_e4m3", "tensor"), _fp8("fp8_e4m3", "row")

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("fp8", _TENSOR, _TENSOR, _fp8("fp8_e5m2", "tensor")),
        Recipe("fp8_rowwise", _ROW, _ROW, _ROW, exact_weight_gradient=True),
        _mx("mxfp8", "mxfp8_e4m3", "mxfp8_e4m3"),
        _mx("mxfp6", "mxfp6_e3m2", "mxfp6_e3m2"),
        _mx("mxint8", "mxint8", "mxint8"),
        _mx("mxfp4w_mxfp6", "mxfp4_e2m1", "mxfp6_e3m2"),
        _mx("mxfp4", "mxfp4_e2m1", "mxfp4_e2m1"),
    )
}


def apply(model: nn.Module, recipe: str | Recipe, targets: Sequence[str] = PRODUCTS) -> int:
    """Let the layers of these kinds (or patterns) multiply as `recipe` says; returns how many.

    Raises ConfigError for an unknown recipe, for named targets that match nothing and for layers that
    are not plain.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ConfigError(f"no low precision {recipe!r}; there are: {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    if targets == PRODUCTS:  # a model need not have each kind of them
        targets = tuple(k for k in PRODUCTS if any(s.kind == k for s in select(model, ("all",))))
    paths = dict.fromkeys(site.module for site in select(model, targets, "low precision"))
    modules = [(path, model.get_submodule(path)) for path in paths]
    for path, module in modules:
        if type(module) not in _LOW:
            raise ConfigError(
                f"{path} is a {type(module).__name__}, which cannot train in {recipe.name}; "
                "remedy: no adapter and no quantized weights, or precision bf16"
            )
    for _, module in modules:
        module.__class__ = _LOW[type(module)]
        module.recipe = recipe  # pyright: ignore[reportArgumentType]
    return len(modules)


def remove(model: nn.Module) -> None:
    """Plain layers again."""
    for module in model.modules():
        if isinstance(module, LowLinear | LowExperts):
            del module.recipe
            plain = nn.Linear if isinstance(module, LowLinear) else Experts
            module.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]


class LowLinear(nn.Linear):
    """A linear whose three products are of few bits."""

    recipe: Recipe

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = autocast(x)
        out = _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight, self.recipe)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class LowExperts(StepwiseExperts):
    """Routed experts whose products are of few bits, after the tokens were sent to them."""

    recipe: Recipe

    def product(self, rows: Tensor, groups: Groups, name: str) -> Tensor:
        return _Grouped.apply(rows, groups.spans, getattr(self, name), self.recipe)


_LOW: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LowLinear, Experts: LowExperts}


def product(a: Tensor, b: Tensor, of_a: Format, of_b: Format) -> Tensor:
    """a (M, K) times b (N, K) transposed, both rounded along K -> (M, N) in a's type."""
    if a.is_cuda and of_a.per in ("tensor", "row") and of_b.per == of_a.per:
        from herdling.quant.fp8_cuda import scaled_product

        return scaled_product(a, b, of_a, of_b)
    # Few bits times a power of two: as exact in bfloat16 as in float32.
    return round_trip(a, of_a) @ round_trip(b, of_b).to(a.dtype).t()


def _weight_gradient(grad: Tensor, rows: Tensor, recipe: Recipe) -> Tensor:
    """grad (M, out), rows (M, in) -> (out, in): summed over the rows."""
    if recipe.exact_weight_gradient:
        return grad.t() @ rows
    return product(grad.t(), rows.t(), recipe.gradients, recipe.inputs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        return product(x, weight, recipe.inputs, recipe.weights)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        recipe, d_x, d_weight = ctx.recipe, None, None
        if ctx.needs_input_grad[0]:
            d_x = product(grad, weight.t(), recipe.gradients, recipe.weights)
        if ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(grad, x, recipe).to(weight.dtype)
        return d_x, d_weight, None


class _Grouped(torch.autograd.Function):
    """The same for each expert's rows: rows (M, in) sorted by expert, weight (E, in, out)."""

    @staticmethod
    def forward(ctx, rows: Tensor, spans: list[Span], weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.spans, ctx.recipe = spans, recipe
        out = rows.new_empty(rows.shape[0], weight.shape[2])
        for e, a, b in spans:
            out[a:b] = product(rows[a:b], weight[e].t(), recipe.inputs, recipe.weights)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        recipe = ctx.recipe
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        for e, a, b in ctx.spans:
            if d_rows is not None:
                d_rows[a:b] = product(grad[a:b], weight[e], recipe.gradients, recipe.weights)
            if d_weight is not None:
                d_weight[e] = _weight_gradient(rows[a:b], grad[a:b], _swapped(recipe))
        return d_rows, None, d_weight, None


def _swapped(recipe: Recipe) -> Recipe:
    """For a weight that lies the other way round, [in, out]."""
    return Recipe(
        recipe.name,
        recipe.weights,
        recipe.gradients,
        recipe.inputs,
        recipe.exact_weight_gradient,
    )
