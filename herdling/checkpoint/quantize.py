"""From a model folder to a quantized one, block by block: peak memory is one shard and one block.

Hidden states of some tokens go along twice, through the plain blocks and through the quantized ones, so
that calibration sees what quantized blocks before it give, and both logits are known at the end. The
folder written is then opened again and run the same way, and must say the very same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from herdling.checkpoint.folder import Folder
from herdling.checkpoint.layers import Layers
from herdling.checkpoint.quantized import Plan, Writing, check_stored
from herdling.checkpoint.save import ShardWriter, save_config
from herdling.errors import CheckpointError, ConfigError
from herdling.model import weights
from herdling.model.llama import Block, build
from herdling.model.sites import Site, sites
from herdling.quant.calibrate import Inputs, capture, gptq_fill, smooth
from herdling.quant.compressed_tensors import group_of
from herdling.quant.formats import Format
from herdling.quant.modules import Matrix
from herdling.quant.schemes import Scheme
from herdling.quant.swap import Report, chosen, matrix_of, place, rows_of

Method = Literal["nearest", "gptq", "awq"]
ROWS = 8
"""Rows of tokens that go through a block at once."""


@dataclass
class Outcome:
    """What was done and what it costs in accuracy, on the tokens that went along."""

    report: Report
    ids: Tensor
    plain: Tensor
    """Logits (B, T, V) of the folder as it was."""
    logits: Tensor
    """Of the quantized one."""
    seen: dict[int, list[int]] = field(default_factory=dict)
    """Layer -> calibration tokens that chose each expert."""

    @property
    def divergence(self) -> float:
        """KL(plain, quantized) in nats a token, mean."""
        p, q = (F.log_softmax(t, -1).flatten(0, 1) for t in (self.plain, self.logits))
        return float(F.kl_div(q, p, log_target=True, reduction="batchmean"))

    @property
    def agreement(self) -> float:
        """Share of tokens after which both find the same one likeliest."""
        return float((self.plain.argmax(-1) == self.logits.argmax(-1)).float().mean())


@torch.no_grad()
def quantize_folder(
    source: Folder,
    folder: Path,
    scheme: Scheme,
    ids: Tensor,
    *,
    targets: Sequence[str] = (),
    method: Method = "nearest",
    every: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int,
    done: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Write the tensors and config of `source`, quantized, into an empty folder.

    Args:
        ids: tokens (B, T) to calibrate with and to compare by.
        every: let all experts see all tokens in calibration.
        dtype: type of plain weights and scales, by default the folder's.
        done: told of each part as it is written.

    Raises ConfigError for what cannot be quantized or stored in this format, before any weight is read.
    """
    dtype = dtype or source.dtype
    report, found = check(source, scheme, targets, dtype, method)
    layers, writer = Layers(source, dtype), ShardWriter(folder, shard_bytes)
    writing = Writing(writer.add, source.config, dtype)
    outcome = Outcome(report, ids, torch.empty(0), torch.empty(0))
    outside = {s.parameter: s for s in found if ".layers." not in s.path or s.kind == "vision"}
    for name in weights.shapes(source.config):
        if not name.startswith(f"{layers.root}model.layers."):
            _write(writing, source, name, outside.get(name), scheme, dtype)
    done("embeddings, head, vision")
    plain = layers.embed(ids)
    coded = plain
    for i in range(layers.count):
        block = None  # the one before goes before this one comes
        prefix, block = layers.prefix(i), layers.block(i)
        own = [_within(site, prefix) for site in found if site.path.startswith(prefix)]
        plain, before = _through(block, layers, plain), coded
        inputs = Inputs()
        if own and method != "nearest":
            inputs = capture(block, before, layers.places(before), every)
            outcome.seen |= {i: inputs.seen} if inputs.seen else {}
        if own and method == "awq":
            smooth(block, inputs, scheme.weights, own)
        fill = gptq_fill(inputs) if method == "gptq" else lambda _, w, form: Matrix.of(w, form)
        try:
            place(block, scheme, own, fill)
        except ConfigError as problem:
            raise ConfigError(f"layer {i}: {problem}") from problem
        coded = _through(block, layers, before)
        _write_block(writing, block, prefix, own, scheme)
        done(f"layer {i + 1} of {layers.count}")
    block = None
    writer.close()
    save_config(folder, source.config, dtype, writing.config())
    outcome.plain = layers.logits(plain)
    written = Layers(Folder.open(folder), dtype)
    outcome.logits = written.logits(coded)
    if not torch.equal(again := _run(written, ids), outcome.logits):
        worst = float((again - outcome.logits).abs().max())
        raise CheckpointError(
            f"{folder.name}: what was written says something else (logits differ by {worst:.3g}); "
            "nothing kept"
        )
    if not outcome.logits.isfinite().all():
        raise CheckpointError("the quantized model gives inf or NaN; nothing kept")
    return outcome


def check(
    source: Folder, scheme: Scheme, targets: Sequence[str], dtype: torch.dtype, method: str
) -> tuple[Report, list[Site]]:
    """What will be done, from shapes alone; ConfigError where it cannot be."""
    if source.plan is not None:
        raise ConfigError(f"{source.path} is quantized already; remedy: take the unquantized model")
    model = build(source.config, dtype, "meta")
    found = chosen(model, scheme, targets)
    check_stored(found, scheme, source.config, dtype)
    if method == "gptq" and scheme.weights.per not in ("row", "group"):
        raise ConfigError(
            f"method gptq needs scales of rows or groups, {scheme.name} has one for each "
            f"{scheme.weights.per}; remedy: --method nearest"
        )

    def empty(_: Site, weight: Tensor, form: Format) -> Matrix:
        return Plan.matrix(tuple(weight.shape), form, dtype, "meta")

    place(model, scheme, found, empty, check=False)
    return Report(rows_of(model, scheme)), found


def _within(site: Site, prefix: str) -> Site:
    """A site as it is named inside its block."""
    path, module = (name.removeprefix(prefix) for name in (site.path, site.module))
    return replace(site, path=path, module=module)


def _through(block: Block, layers: Layers, x: Tensor) -> Tensor:
    return torch.cat([block(rows, layers.places(rows), None) for rows in x.split(ROWS)])


def _run(layers: Layers, ids: Tensor) -> Tensor:
    x = layers.embed(ids)
    for i in range(layers.count):
        x = _through(layers.block(i), layers, x)
    return layers.logits(x)


def _write(
    writing: Writing,
    source: Folder,
    name: str,
    site: Site | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> None:
    tensor = source.read(name, dtype)
    if site is None:
        writing.plain(name, tensor)
        return
    matrix = Matrix.of(tensor, group_of(scheme, dtype).form)
    writing.matrix(site, matrix, scheme.activations)


def _write_block(
    writing: Writing, block: Block, prefix: str, own: Sequence[Site], scheme: Scheme
) -> None:
    for site in _pairs(block, own):
        matrix = matrix_of(block, site)
        assert matrix is not None
        path, module = prefix + site.path, prefix + site.module
        writing.matrix(replace(site, path=path, module=module), matrix, scheme.activations)
    for name, parameter in block.named_parameters():
        writing.plain(prefix + name, parameter)


def _pairs(block: Block, own: Sequence[Site]) -> Iterator[Site]:
    """Sites of the block, in its order, that are among `own`."""
    paths = {site.path for site in own}
    return (site for site in sites(block) if site.path in paths)
