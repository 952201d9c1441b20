"""Prompts that go through the model together: left-padded, prefilled in pieces, then token by token.

Padding stands at the left and is a document of its own, and each row counts its positions from its
first real token, so a row computes what it would compute alone. Images are encoded once, tile by
tile; a piece of the prefill takes the features of the patch tokens that lie in it, wherever it cuts.
Rows of equal length need no padding and so no attention mask. Left out: dropping rows that are
finished (their slot is computed to the end) and sharing prefixes.

Shape letters: B rows, T columns of the padded prompts, D model width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from herdling.infer.request import Request
from herdling.model.cache import Cache
from herdling.model.llama import LanguageModel, MultimodalLM, decoder_of

ENCODER_TOKENS = 2**14
"""Patches that the vision encoder takes at once, which bounds its memory."""
MASK_ENTRIES = 2**26
"""Queries times keys of one piece of the prefill, which bounds the attention mask."""


class Batch:
    """The running state of some requests: call `prefill` once, then `step` again and again."""

    def __init__(self, model: LanguageModel, requests: Sequence[Request], piece: int) -> None:
        """`piece` bounds the tokens (rows times columns) of one call in the prefill."""
        self.model = model
        self.cache = Cache(model.config.text)
        self._decoder = decoder_of(model)
        device = next(model.parameters()).device
        lengths = [len(request.ids) for request in requests]
        longest = max(lengths)
        self._columns = max(1, piece // len(requests))
        rows = [[0] * (longest - len(request.ids)) + list(request.ids) for request in requests]
        self._ids = torch.tensor(rows, device=device)  # (B, T)
        pad = torch.tensor([longest - n for n in lengths], device=device)[:, None]
        at = torch.arange(longest, device=device)[None] - pad  # (B, T), negative in the padding
        self._real = at >= 0
        self._padded = min(lengths) < longest
        self._positions = at.clamp(min=0)
        self._next = torch.tensor(lengths, device=device)[:, None]  # (B, 1)
        tiles = [request.tiles for request in requests if request.tiles is not None]
        self._features: Tensor | None = None
        if tiles and isinstance(model, MultimodalLM):
            self._features = encode(model, torch.cat(tiles))  # (patches of all rows, D)
            slots = self._slots(self._ids, self._real)
            self._feature_of = slots.flatten().cumsum(0).view_as(slots) - 1  # (B, T)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Read the prompts; returns the logits (B, V) float32 of the first new token."""
        B, T = self._ids.shape
        b = 0
        while True:
            a, room = b, max(1, MASK_ENTRIES // (B * (b + self._columns)))
            b = min(a + min(self._columns, room), T)
            out = self._decoder.decode(
                self._embed(a, b),
                *self._places(self._positions[:, a:b], self._real[:, a:b]),
                self.cache,
                _last_logits if b == T else _nothing,
            )
            if b == T:
                return out

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token a row; returns the logits (B, V) float32 of the next."""
        ids = torch.tensor(tokens, device=self._ids.device)[:, None]
        places = self._places(self._next, torch.ones_like(self._next, dtype=torch.bool))
        self._next = self._next + 1
        return self._decoder.decode(
            self._decoder.model.embed_tokens(ids), *places, self.cache, _last_logits
        )

    def _places(self, positions: Tensor, real: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Positions and documents, or neither when every row stands at the cache's own length."""
        return (positions, real.long() - 1) if self._padded else (None, None)

    def _slots(self, ids: Tensor, real: Tensor) -> Tensor:
        return (ids == self.model.config.image_token_index) & real

    def _embed(self, a: int, b: int) -> Tensor:
        ids = self._ids[:, a:b]
        x = self._decoder.model.embed_tokens(ids)
        if self._features is not None:
            slots = self._slots(ids, self._real[:, a:b])
            x[slots] = self._features[self._feature_of[:, a:b][slots]].to(x.dtype)
        return x


@torch.no_grad()
def encode(model: MultimodalLM, tiles: Tensor) -> Tensor:
    """Image features in the decoder's width: tiles (n, 3, S, S) -> (n * tokens_per_tile, D)."""
    vision, device = model.config.vision, next(model.parameters()).device
    assert vision is not None
    at_once = max(1, ENCODER_TOKENS // (vision.grid**2 + 1))
    return torch.cat([model.encode(part.to(device)) for part in tiles.split(at_once)]).flatten(0, 1)


def _last_logits(hidden: Tensor, head: nn.Linear) -> Tensor:
    return head(hidden[:, -1]).float()


def _nothing(hidden: Tensor, head: nn.Linear) -> Tensor:
    """Pieces before the last one are read for the cache alone."""
    return hidden[:, :0]
