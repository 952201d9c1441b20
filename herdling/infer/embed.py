"""Texts as vectors: the mean of a model's last hidden states, at length 1.

    pooled(model, [[bos, 5, 6], [bos, 7]], bos)           # (2, D) float32

A decoder is no trained embedder, but similar texts come out near each other. Begin_of_text is left out
of the mean: it sees nothing but itself, so its state is the same in every text and would only push all
vectors together. Sentence-transformers calls this mean pooling.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from herdling.errors import InputError
from herdling.model.cache import Cache
from herdling.model.llama import LanguageModel, decoder_of

PIECE = 1024
"""Tokens of a text that the model reads at once."""


def pooled(model: LanguageModel, texts: Sequence[Sequence[int]], bos: int) -> Tensor:
    """A vector of length 1 for each text of token ids: (texts, D) float32, on the CPU.

    Raises InputError for a text without tokens.
    """
    return torch.stack([list(reading(model, ids, bos))[-1] for ids in texts])


def reading(
    model: LanguageModel, ids: Sequence[int], bos: int, piece: int = PIECE
) -> Iterator[Tensor]:
    """The vector (D,) of what has been read so far, after each `piece` tokens; the last is the text's.

    Whoever shares the model with others can let them in between. Raises InputError as `pooled` does,
    and for ids outside the vocabulary or more of them than the model has positions.
    """
    text = model.config.text
    if not ids:
        raise InputError("a text has no tokens; there is nothing to embed")
    if len(ids) > text.max_position_embeddings:
        raise InputError(
            f"a text has {len(ids)} tokens; the model takes {text.max_position_embeddings}"
        )
    if not 0 <= min(ids) <= max(ids) < text.vocab_size:
        raise InputError(f"a token id is outside the vocabulary, 0..{text.vocab_size - 1}")
    return _reading(model, ids, int(ids[0] == bos and len(ids) > 1), piece)


def _reading(
    model: LanguageModel, ids: Sequence[int], skipped: int, piece: int
) -> Iterator[Tensor]:
    decoder, cache = decoder_of(model), Cache(model.config.text)
    device = next(model.parameters()).device
    total = torch.zeros(model.config.text.hidden_size, dtype=torch.float64)
    for start in range(0, len(ids), piece):
        part = torch.tensor([ids[start : start + piece]], device=device)
        with torch.no_grad():
            x = decoder.model.embed_tokens(part)
            hidden = decoder.decode(x, None, None, cache, lambda hidden, head: hidden)  # (1, T, D)
        total += hidden[0, 0 if start else skipped :].double().sum(0).cpu()
        yield shortened(total.float())


def shortened(vector: Tensor, dimensions: int | None = None) -> Tensor:
    """The first `dimensions` (default: all) of a vector (D,), at length 1 again.

    Raises InputError for more than there are, or less than 1.
    """
    size = vector.shape[-1]
    if dimensions is not None and not 0 < dimensions <= size:
        raise InputError(f"dimensions is {dimensions}; the model's vectors have 1 to {size}")
    return nn.functional.normalize(vector[..., :dimensions], dim=-1)
