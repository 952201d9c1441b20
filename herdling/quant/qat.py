"""Quantization-aware training: weights and activations are rounded in every forward, gradients pass.

    prepare(model, scheme("w4a8"))      # fake quantization on linears and on every routed expert
    ... train as always ...
    convert(model)                      # codes and scales: the very numbers that were trained with

The weights stay float32, keep their names and go on moving a little in each step (straight-through,
Bengio et al., arXiv 1308.3432); what the products see are the numbers of the format. A weight beyond
the format's range gets no gradient, as in torchao, where its scale does not come from its mean.
Activations get a scale for each token, of experts after the tokens were sent to them.

As in Meta's recipe for Llama 3.2 (1B/3B): `prepare(..., ends=True)` rounds embedding and output head
to int8 as well, a scale for each word. The head's input is not rounded in training, because the loss
multiplies by the head itself; after `convert` it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.kernels.grouped_matmul import Groups, autocast, grouped_matmul
from herdling.model.llama import Experts, LanguageModel
from herdling.model.sites import Site, sites
from herdling.quant import swap
from herdling.quant.experts import StepwiseExperts
from herdling.quant.formats import Format, format_of, in_range, round_trip
from herdling.quant.modules import Matrix, QuantExperts, QuantLinear, rounded
from herdling.quant.schemes import Scheme

ENDS = Scheme(
    "int8 ends", format_of("int8"), format_of("int8", divisor=127.0), kinds=("head",)
)  # fmt: skip
"""Of embedding and head."""


def fake(weight: Tensor, form: Format, dim: int = -1) -> Tensor:
    """The weight in a format's numbers; its gradient as if it had not been rounded."""
    return _Fake.apply(weight, form, dim)


class _Fake(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, form: Format, dim: int) -> Tensor:
        # Ternary numbers (b1.58) clip most weights: theirs must go on learning.
        clips = form.rule != "mean" and ctx.needs_input_grad[0]
        ctx.save_for_backward(*([in_range(weight, form, dim)] if clips else []))
        if weight.dim() == 3 and form.rule == "mean":
            # One by one, as they are converted: a mean's last bit depends on the order of its sum.
            return torch.stack([round_trip(w.mT, form).mT for w in weight])
        return round_trip(weight, form, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inside,) = ctx.saved_tensors or (None,)
        return grad if inside is None else grad * inside, None, None


class FakeLinear(nn.Linear):
    """A linear on rounded weights and rounded inputs."""

    scheme: Scheme

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = autocast(x)
        weight = fake(self.weight, self.scheme.weights).to(x.dtype)
        out = F.linear(rounded(x, self.scheme.activations), weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FakeHead(nn.Linear):
    """The output head, whose `weight` is the rounded one: losses multiply by it themselves."""

    scheme: Scheme

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        weight = self._parameters["weight"]
        assert weight is not None
        return fake(weight, self.scheme.weights)


class FakeEmbedding(nn.Embedding):
    """Rows of a table that is rounded, only those that are looked up."""

    scheme: Scheme

    def forward(self, input: Tensor) -> Tensor:
        return fake(super().forward(input), self.scheme.weights)


class FakeExperts(StepwiseExperts):
    """Routed experts on rounded weights and rounded inputs."""

    scheme: Scheme

    def product(self, rows: Tensor, groups: Groups, name: str) -> Tensor:
        form = self.scheme.weights
        form = replace(form, per="expert") if form.per == "tensor" else form
        weight = fake(getattr(self, name), form, 1)
        return grouped_matmul(rounded(rows, self.scheme.activations), groups, weight)


_FAKE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeLinear,
    Experts: FakeExperts,
    nn.Embedding: FakeEmbedding,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    **{fake: plain for plain, fake in _FAKE.items()},
    FakeHead: nn.Linear,
}


def prepare(
    model: LanguageModel, scheme: Scheme, targets: Sequence[str] = (), ends: bool = False
) -> list[Site]:
    """Round in every forward what `quant.swap.swap` would quantize; returns those sites.

    `ends`: embedding and head to int8 as well. Raises ConfigError as `swap` does.
    """
    found = swap.chosen(model, scheme, targets)
    for path in dict.fromkeys(site.module for site in found):
        _change(model.get_submodule(path), path, scheme)
    if ends:
        for path, module in list(model.named_modules()):
            if path.endswith(("embed_tokens", "lm_head")):
                _change(module, path, ENDS)
    return found


def _change(module: nn.Module, path: str, scheme: Scheme) -> None:
    if isinstance(module, QuantLinear | QuantExperts):
        raise ConfigError(f"qat: {path} is quantized already; remedy: take the unquantized model")
    if type(module) not in _FAKE:
        raise ConfigError(
            f"qat: {path} is a {type(module).__name__}, not a plain weight; "
            "prepare before adapters are attached"
        )
    module.__class__ = FakeHead if path.endswith("lm_head") else _FAKE[type(module)]
    module.scheme = scheme  # pyright: ignore[reportArgumentType]


def prepared(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that round, by name."""
    return ((name, m) for name, m in model.named_modules() if type(m) in _PLAIN)


def remove(model: nn.Module) -> None:
    """Plain layers again, with the float weights as they are now."""
    for _, module in prepared(model):
        del module.scheme
        module.__class__ = _PLAIN[type(module)]


@contextmanager
def removed(model: nn.Module) -> Iterator[None]:
    """In here the layers are plain ones."""
    before = [(module, type(module), module.scheme) for _, module in prepared(model)]
    remove(model)
    try:
        yield
    finally:
        for module, kind, scheme in before:
            module.__class__ = kind
            module.scheme = scheme


@torch.no_grad()
def convert(model: LanguageModel) -> swap.Report:
    """Put codes and scales in the place of what was prepared; returns the coverage of the model.

    An embedding, which has no quantized module, stays a float tensor and holds the int8 grid's numbers.
    """
    schemes = {path: module.scheme for path, module in prepared(model)}
    if not schemes:
        raise ConfigError("qat: nothing to convert; prepare comes first")
    embeddings = [m for _, m in prepared(model) if type(m) is FakeEmbedding]
    remove(model)
    for module in embeddings:
        module.weight.copy_(round_trip(module.weight, ENDS.weights))
    scheme = ENDS
    for scheme in dict.fromkeys(schemes.values()):
        own = [site for site in sites(model) if schemes.get(site.module) is scheme]
        swap.place(model, scheme, own, lambda site, weight, form: Matrix.of(weight, form))
    return swap.Report(swap.rows_of(model, next(iter(schemes.values()))))
