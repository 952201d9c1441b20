"""Models that guess for a larger one: a smaller model, or the model without its routed experts.

    drafter = ModelDraft(small.model, small.tokenizer, large.model, large.tokenizer)
    drafter = SharedExpertDraft(large.model)

They guess their likeliest tokens, natively and for a batch together where they can (`draft_native`). Asked
to be `sampled`, they draw from their own distribution after the request's temperature and cuts, each
sequence by itself; penalties, bias and grammars are left to the target. Left out: images (a draft
reads patch tokens as text, which costs acceptance only).

Shape letters: g proposed tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from herdling.errors import ConfigError
from herdling.infer.costs import draft_cost
from herdling.infer.draft_native import PIECE, NativeDrafts, together
from herdling.infer.drafts import Asked, Draft, Proposal
from herdling.infer.native import Native
from herdling.infer.rewind import RewindCache
from herdling.infer.sampler import Sampler, probabilities
from herdling.infer.speculative import draw_from
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel, MoE, TextLM, decoder_of

M = TypeVar("M", bound=nn.Module)


class _Drafts:
    """What both kinds of drafts are: a decoder that guesses."""

    def __init__(self, model: TextLM, longest: int, sampled: bool) -> None:
        self._model, self.longest, self.sampled = model, longest, sampled
        self._leaves = Native(model)
        self._native = NativeDrafts(model, longest)

    def begin(self, ids: Sequence[int]) -> Draft:
        if self._native.fits and not self.sampled:
            return self._native.begin(ids)
        return ModelGuess(self._model, self._leaves, ids, self.longest, self.sampled)

    def propose(self, asked: Sequence[Asked]) -> list[Proposal]:
        return together(self._native, asked)


class ModelDraft(_Drafts):
    """A smaller model with the same tokens."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        target: LanguageModel,
        target_tokenizer: Tokenizer,
        longest: int = 8,
        sampled: bool = False,
    ) -> None:
        """`longest` bounds what is proposed at once, and so what may have to be taken back.

        With `sampled` guesses are drawn as the request draws, which more of them survive at high
        temperatures, but every step of a draft costs more. Raises ConfigError if the two do not
        number the same tokens alike.
        """
        check_same_tokens(model, tokenizer, target, target_tokenizer)
        super().__init__(decoder_of(model), longest, sampled)
        self.cost = draft_cost(model.config, target.config)


class SharedExpertDraft(_Drafts):
    """Self-speculation: the target itself with its routed experts skipped. No weights of its own."""

    def __init__(self, target: LanguageModel, longest: int = 8, sampled: bool = False) -> None:
        super().__init__(without_routed(decoder_of(target)), longest, sampled)
        self.cost = draft_cost(target.config, target.config, routed=False)


class ModelGuess:
    """A model's guesses for one sequence, with a cache of what it has read of it."""

    def __init__(
        self, model: TextLM, native: Native, ids: Sequence[int], longest: int, sampled: bool
    ) -> None:
        self._model, self._native, self._longest = model, native, longest
        self._sampled = sampled
        self._ids = list(ids)
        self._cache = RewindCache(model.config.text, slack=longest + 1)
        self._guessed: list[int] = []
        """Proposed tokens that the cache has read behind `_ids`."""

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @torch.inference_mode()
    def propose(self, count: int, sampler: Sampler) -> Proposal:
        self._retract(0)
        if self._cache.length == len(self._ids):  # its last logits are gone: read the token again
            self._cache.rewind(len(self._ids) - 1)
        room = self._model.config.text.max_position_embeddings - len(self._ids)
        count = min(count, self._longest, room)
        unread = self._ids[self._cache.length :]
        if count < 1:
            return Proposal([])
        if len(unread) > PIECE:
            self._read(unread[:PIECE])
            return Proposal([])
        row, tokens, q = self._read(unread), [], []
        for i in range(count):
            token = int(row.argmax())
            if self._sampled and sampler.sampling.temperature > 0:
                q.append(probabilities(row[None], sampler.sampling)[0])
                token = draw_from(q[-1], sampler)
            tokens.append(token)
            if i < count - 1:
                row = self._read([token])
                self._guessed.append(token)
        return Proposal(tokens, torch.stack(q) if q else None)

    def commit(self, tokens: Sequence[int]) -> None:
        pairs = zip(self._guessed, tokens, strict=False)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        self._retract(min(len(self._guessed), len(tokens)) if agreed is None else agreed)
        self._ids += tokens

    def _retract(self, kept: int) -> None:
        """Take back the guesses behind the first `kept`."""
        if len(self._guessed) > kept:
            self._cache.rewind(self._cache.length - len(self._guessed) + kept)
        self._guessed = []

    def _read(self, ids: Sequence[int]) -> Tensor:
        """Logits (V,) behind `ids`."""
        device = next(self._model.parameters()).device
        with self._native.leaves(len(ids), len(self._ids)):
            return self._model(torch.tensor([ids], device=device), cache=self._cache, readout=_last)


def _last(hidden: Tensor, head: nn.Linear) -> Tensor:
    return head(hidden[0, -1]).float()


def without_routed(model: TextLM) -> TextLM:
    """The same model with only the shared expert in each MoE layer: other modules around the same
    parameters, so it follows whatever becomes of their values."""
    lm = _shallow(model)
    decoder = _shallow(model.model)
    layers = []
    for block in model.model.layers:
        layer = _shallow(block)
        if isinstance(block.feed_forward, MoE):
            layer._modules["feed_forward"] = block.feed_forward.shared_expert
        layers.append(layer)
    decoder._modules["layers"] = nn.ModuleList(layers)
    lm._modules["model"] = decoder
    return lm


def _shallow(module: M) -> M:
    """A second module that holds the same parameters and parts."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def check_same_tokens(
    model: LanguageModel, tokenizer: Tokenizer, target: LanguageModel, target_tokenizer: Tokenizer
) -> None:
    """Raise ConfigError unless draft and target mean the same by every id."""
    sizes = [m.config.text.vocab_size for m in (model, target)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft's vocab_size is {sizes[0]}, the target's {sizes[1]}; a draft needs the target's "
            "tokenizer: train it with the same one"
        )
    ours, theirs = tokenizer.specials, target_tokenizer.specials
    if ours != theirs:
        name = min(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        raise ConfigError(
            f"control token {name} has id {ours.get(name)} in the draft and {theirs.get(name)} in the "
            "target; a draft needs the target's tokenizer"
        )
    count = max(len(tokenizer), len(target_tokenizer))
    for id in range(count):
        if tokenizer.to_bytes([id]) != target_tokenizer.to_bytes([id]):
            raise ConfigError(
                f"token {id} is {tokenizer.to_bytes([id])!r} in the draft and "
                f"{target_tokenizer.to_bytes([id])!r} in the target; a draft needs the target's "
                "tokenizer"
            )
