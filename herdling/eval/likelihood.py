"""How well a model predicts held-out text, in bits per byte, beside what needs no model.

    for domain, result in likelihood(lm, examples).items():
        print(domain, result.bits_per_byte, result.baselines)

Bits per byte compare models of any vocabulary, and with compressors. Control tokens are no text:
neither their loss nor their names count. Left out: sliding windows; a text longer than a window (the
model's context, or `length`) is scored in windows that do not overlap.
"""

import gzip
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herdling.data.packing import IGNORE, cut
from herdling.data.sources import Example
from herdling.errors import InputError
from herdling.infer.lm import LM
from herdling.kernels.cross_entropy import log_probs


@dataclass(frozen=True)
class Likelihood:
    """What was measured on one domain."""

    bits_per_byte: float
    loss: float
    """Mean loss of a token in nats."""
    tokens: int
    bytes: int
    baselines: dict[str, float]
    """Bits per byte of `unigram` (the tokens by their own frequencies), `gzip` and `lzma`.

    All three see the very bytes they are scored on, so a model that beats them has learnt more.
    """


@dataclass(frozen=True)
class _Window:
    """A stretch of one example that goes through the model as one document."""

    tokens: list[int]
    labels: list[int]
    tiles: Tensor | None
    domain: str


def likelihood(
    lm: LM, examples: Iterable[Example], batch_tokens: int = 8192, length: int | None = None
) -> dict[str, Likelihood]:
    """Score the tokens that each example wants predicted; results by domain.

    `batch_tokens` bounds what goes through the model at once. `length` is that of a window in tokens:
    the context by default, but a model that has only seen shorter rows is measured at theirs. Raises
    InputError when a domain has no text to predict, an example with images is longer than a window,
    or a window longer than the model's context.
    """
    context = lm.config.text.max_position_embeddings
    length = context if length is None else length
    if not 1 <= length <= context:
        raise InputError(f"length is {length}; it must be 1 to {context}, the model's context")
    windows = [window for example in examples for window in _windows(lm, example, length)]
    domains = sorted({window.domain for window in windows})
    nats: dict[str, float] = defaultdict(float)
    scored: dict[str, list[int]] = defaultdict(list)
    for batch in _batches(windows, batch_tokens):
        for window, loss in zip(batch, _losses(lm, batch), strict=True):
            nats[window.domain] += loss
    for window in windows:  # in the order given, so that compressors see the text as it is
        scored[window.domain] += [token for token in window.labels if token != IGNORE]
    return {domain: _result(lm, domain, nats[domain], scored[domain]) for domain in domains}


def example_losses(lm: LM, examples: Sequence[Example], *, batch_tokens: int = 4096) -> list[float]:
    """Mean loss of each example over what is learnt from it, in nats a token; inf for nothing.

    Each stands alone and whole. Control tokens are read and not scored.
    """
    windows = [next(_windows(lm, example, len(example.tokens))) for example in examples]
    found: dict[int, float] = {}
    for batch in _batches(windows, batch_tokens):
        for window, loss in zip(batch, _losses(lm, batch), strict=True):
            scored = sum(label != IGNORE for label in window.labels)
            found[id(window)] = loss / scored if scored else math.inf
    return [found[id(window)] for window in windows]


def _windows(lm: LM, example: Example, length: int) -> Iterator[_Window]:
    control = set(lm.tokenizer.specials.values())
    pieces = cut(example, length)
    if pieces is None:
        raise InputError(
            f"{example.domain}: an example with images has {len(example.tokens)} tokens; the length "
            f"of a window is {length}"
        )
    for piece in pieces:
        labels = [IGNORE if label in control else label for label in piece.labels.tolist()]
        yield _Window(piece.tokens.tolist(), labels, piece.tiles, example.domain)


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Windows of similar length together, at most `batch_tokens` with their padding."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: len(window.tokens)):
        if batch and len(window.tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.no_grad()
def _losses(lm: LM, batch: list[_Window]) -> list[float]:
    """Summed loss of each window in nats. Padding stands at the right, where nothing sees it."""
    width = max(len(window.tokens) for window in batch)
    rows = [(window, width - len(window.tokens)) for window in batch]
    ids = torch.tensor([w.tokens + [0] * n for w, n in rows], device=lm.device)
    labels = torch.tensor([w.labels + [IGNORE] * n for w, n in rows], device=lm.device)
    tiles = [window.tiles for window in batch if window.tiles is not None]
    values = lm.model(
        ids,
        pixel_values=torch.cat(tiles).to(lm.device) if tiles else None,
        readout=lambda hidden, head: log_probs(hidden, head, labels),
    )
    return (-values.double().sum(1)).tolist()


def _result(lm: LM, domain: str, nats: float, tokens: list[int]) -> Likelihood:
    text = lm.tokenizer.to_bytes(tokens)
    if not text:
        raise InputError(f"{domain}: no text to predict among the examples")
    counts = Counter(tokens).values()
    unigram = -sum(n * math.log2(n / len(tokens)) for n in counts)
    packed = {"gzip": gzip.compress(text, 9), "lzma": lzma.compress(text, preset=9)}
    baselines = {"unigram": unigram / len(text)}
    baselines |= {name: 8 * len(data) / len(text) for name, data in packed.items()}
    bits = nats / math.log(2) / len(text)
    return Likelihood(bits, nats / len(tokens), len(tokens), len(text), baselines)
