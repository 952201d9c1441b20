"""Rounding that looks at what enters each product: GPTQ, and scaling as in AWQ.

    inputs = capture(block, hidden, at, every=False)      # what enters each product, a row a token
    fill = gptq_fill(inputs)                              # for `swap.place`
    smooth(block, inputs, form, found)                    # or this in place, then plain rounding

GPTQ (arXiv 2210.17323): columns are rounded one after the other, and the error of each is put on those
not yet rounded, by the inverse of the inputs' Gram matrix. AWQ (arXiv 2306.00978): input channels that
are large get finer steps, by a scale that the layer before takes out again; only exact foldings are
made (norm into attention, feed-forward and router; up into down). Left out: clipping, act-order.

Llama 4 multiplies an expert's *input* by its gate, so rows of experts are gate * x. An expert sees the
tokens that chose it; with `every`, all tokens, each with the gate that it would have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.model.llama import MLP, Block, Experts, MoE, Places
from herdling.model.sites import Site
from herdling.quant.formats import Format, Quantized, quantize, round_trip, wide
from herdling.quant.modules import Matrix

DAMP = 0.01
"""Added to the Gram matrix's diagonal, as a share of its mean."""
COLUMNS = 128
"""Columns whose errors are put on the rest in one product."""
GRID = 20
"""Exponents tried for the scale of input channels, from 0 to below 1."""
SAMPLE = 512
"""Rows by which a scale is judged."""


@dataclass
class Inputs:
    """What enters the products of a block: rows of tokens."""

    linears: dict[str, Tensor] = field(default_factory=dict)
    """By name within the block: (n, in)."""
    experts: str = ""
    """Name of the routed experts, if the block has any."""
    rows: list[Tensor] = field(default_factory=list)
    """Of each expert: gate * x (n, D)."""
    seen: list[int] = field(default_factory=list)
    """Tokens that chose each expert."""


@torch.no_grad()
def capture(block: Block, x: Tensor, at: Places, every: bool) -> Inputs:
    """Run hidden states (B, T, D) through a plain block and keep what enters its products."""
    found = Inputs()
    with _hooks(block, found, every):
        block(x, at, None)
    return found


@contextmanager
def _hooks(block: Block, found: Inputs, every: bool) -> Iterator[None]:
    handles = []

    def linear(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.linears[name] = args[0].flatten(0, -2)

        return keep

    def routed(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, chosen, gates = args
        assert isinstance(block.feed_forward, MoE)
        logits = block.feed_forward.router(x)[2]  # (N, E)
        found.seen = torch.bincount(chosen.flatten(), minlength=logits.shape[1]).tolist()
        for e in range(logits.shape[1]):
            if every:
                gate = torch.sigmoid(logits[:, e, None].float()).to(x.dtype)
                found.rows.append(x * gate)
            else:
                token, place = (chosen == e).nonzero(as_tuple=True)
                found.rows.append(x[token] * gates[token, place, None])

    for name, module in block.named_modules():
        if isinstance(module, Experts):
            found.experts = name
            handles.append(module.register_forward_pre_hook(routed))
        elif type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(linear(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gptq_fill(inputs: Inputs) -> Callable[[Site, Tensor, Format], Matrix]:
    """Makes a site's matrix by GPTQ; of experts that saw no token, by plain rounding.

    Experts' down matrices are made for what the rounded gate and up matrices give.
    """
    before: list[Matrix] = []

    def fill(site: Site, weight: Tensor, form: Format) -> Matrix:
        if site.fused is None:
            q = gptq(weight, gram(inputs.linears[site.path]), form)
            made = Matrix(form, q.shape[0], q.shape[1], 0, weight.dtype, weight.device)
            made.put(q)
            return made
        E, width, outputs = weight.shape
        made = Matrix(form, outputs, width, E, weight.dtype, weight.device)
        for e in range(E):
            rows = inputs.rows[e]
            if site.fused == "down_proj":
                rows = _inner(rows, before[-1][e])
            plain = weight[e].T
            made.put(gptq(plain, gram(rows), form) if len(rows) else quantize(plain, form), e)
        before.append(made)
        return made

    return fill


def _inner(rows: Tensor, gate_up: Tensor) -> Tensor:
    """silu(gate) * up: rows (n, D), gate_up (D, 2F) -> (n, F)."""
    gate, up = (rows @ gate_up.to(rows.dtype)).chunk(2, -1)
    return F.silu(gate) * up


def gram(rows: Tensor) -> Tensor:
    """(n, in) -> (in, in) float64, divided by n."""
    wide = rows.double()
    return wide.T @ wide / max(1, len(rows))


@torch.no_grad()
def gptq(weight: Tensor, gram: Tensor, form: Format) -> Quantized:
    """A weight (out, in) in a format, so that the error on inputs of this Gram matrix is small.

    Scales are those of plain rounding, of a group when its first column is reached. Raises ConfigError
    for scales that are neither of rows nor of groups.
    """
    if form.per not in ("row", "group"):
        raise ConfigError(
            f"gptq: {form.name} has one scale for each {form.per}; remedy: --method nearest, or a "
            "format with scales of rows or groups"
        )
    W, n = weight.detach().float().clone(), weight.shape[1]
    size = form.group if form.per == "group" else n
    upper = _factor(gram).to(torch.float32)
    values, scales = torch.empty_like(W), []
    scale = step = W.new_empty(0)
    for start in range(0, n, COLUMNS):
        stop = min(start + COLUMNS, n)
        errors = W.new_zeros(W.shape[0], stop - start)
        for i in range(start, stop):
            if i % size == 0:
                # Columns of this block have their errors already; those of a group beyond it not yet.
                ahead = W[:, i : i + size].clone()
                if i + size > stop:
                    ahead[:, stop - i :] -= errors @ upper[start:stop, stop : i + size]
                scale = quantize(ahead, form).scales
                scales.append(scale)
                step = wide(scale)
            scaled = W[:, i, None] / step if form.rule == "power" else W[:, i, None] * (1 / step)
            number = form.element.snap(scaled, form.rounding)
            values[:, i] = number[:, 0]
            error = (W[:, i] - (number * step)[:, 0]) / upper[i, i]
            W[:, i:stop] -= error[:, None] * upper[i, i:stop]
            errors[:, i - start] = error
        W[:, stop:] -= errors @ upper[start:stop, stop:]
    codes = form.element.encode(values)
    return Quantized(form, codes, torch.cat(scales, 1), 1, weight.dtype)


def _factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse; more is added to the diagonal where it has to be."""
    H = gram.clone()
    diagonal = H.diagonal()
    diagonal[diagonal == 0] = 1  # an input that was always zero says nothing of its column
    share = DAMP * diagonal.mean()
    for _ in range(6):
        diagonal += share
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        share = share * 10
    raise ConfigError(
        "gptq: the inputs' Gram matrix is not positive; are there inf or NaN in them?"
    )


@torch.no_grad()
def smooth(block: Block, inputs: Inputs, form: Format, found: Sequence[Site]) -> None:
    """Scale the input channels of a plain block's products in place, where it lowers their error.

    What the block computes stays the same, but for rounding to its type.
    """
    chosen = {site.path for site in found} | {site.module for site in found}
    ff = block.feed_forward
    names = [f"self_attn.{n}_proj" for n in "qkv"]
    readers: list[Tensor] = [getattr(block.self_attn, f"{n}_proj").weight for n in "qkv"]
    judged = [(w, inputs.linears[n]) for n, w in zip(names, readers, strict=True) if n in chosen]
    _fold(block.input_layernorm.weight, readers, judged, form)
    plain = "feed_forward.shared_expert" if isinstance(ff, MoE) else "feed_forward"
    mlp = block.get_submodule(plain)
    assert isinstance(mlp, MLP)
    readers = [mlp.gate_proj.weight, mlp.up_proj.weight]
    names = [f"{plain}.gate_proj", f"{plain}.up_proj"]
    judged = [(w, inputs.linears[n]) for n, w in zip(names, readers, strict=True) if n in chosen]
    if isinstance(ff, MoE):
        readers.append(ff.router.weight)
        experts = [w.T for w in ff.experts.gate_up_proj.detach()]
        readers += experts
        if inputs.experts in chosen:
            judged += [(w, r) for w, r in zip(experts, inputs.rows, strict=True) if len(r)]
    scale = _fold(block.post_attention_layernorm.weight, readers, judged, form)
    if f"{plain}.down_proj" in chosen:
        down = mlp.down_proj.weight
        _fold(mlp.up_proj.weight, [down], [(down, inputs.linears[f"{plain}.down_proj"])], form)
    if isinstance(ff, MoE) and inputs.experts in chosen:
        width = ff.experts.down_proj.shape[1]
        for e, rows in enumerate(inputs.rows):
            gate_up, down = ff.experts.gate_up_proj[e], ff.experts.down_proj[e].T
            if len(rows):
                act = _inner((rows / scale).to(rows.dtype), gate_up)  # rows of before the change
                _fold(gate_up[:, width:].T, [down], [(down, act)], form)


def _fold(
    giver: Tensor, readers: Sequence[Tensor], judged: Sequence[tuple[Tensor, Tensor]], form: Format
) -> Tensor:
    """Divide the outputs of `giver` and multiply the inputs of `readers` by the best scale (in,)."""
    size = giver.shape[0]
    best = torch.ones(size, device=giver.device)
    if judged:
        share = -(-SAMPLE // len(judged))
        pairs = [(w.float(), _some(rows, share).float()) for w, rows in judged]
        large = torch.cat([rows.float().abs() for _, rows in judged]).mean(0).clamp(min=1e-6)
        least = torch.inf
        for i in range(GRID):
            scale = large ** (i / GRID)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = 0.0
            for weight, rows in pairs:
                change = round_trip(weight * scale, form) / scale - weight
                error += float((rows @ change.T).square().sum())
            if error < least:
                least, best = error, scale
    giver.div_((best if giver.dim() == 1 else best[:, None]).to(giver.dtype))
    for weight in readers:
        weight.mul_(best.to(weight.dtype))
    return best


def _some(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread."""
    return rows[:: max(1, len(rows) // count)][:count]
