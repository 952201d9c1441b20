"""A draft model's greedy guesses for all sequences of a batch, several steps in one native call.

A draft is small, so what a step costs is what stands around it: here nothing does. Keys and values lie
in a paged store of the draft's own; what was guessed wrong is written over. Guesses are the likeliest
tokens, whatever the temperature: `accept` then gives the very tokens that it gives without them. Left
out: long prompts by torch's products (a draft reads them `PIECE` tokens at a time).
"""

import os
import weakref
from collections.abc import Sequence

import torch
from torch import nn

from herdling.infer.drafts import Asked, Proposal
from herdling.infer.native import Native
from herdling.infer.pages import Pages, Store
from herdling.infer.prefix import Chain
from herdling.infer.runner import Layer
from herdling.infer.sampler import Sampler
from herdling.infer.sequence import Memory
from herdling.kernels import cpu
from herdling.kernels.cpu.guess import Guesser, Reader
from herdling.model.llama import Places, TextLM

PIECE = 512
"""Tokens that are read at once; while a draft is further behind it proposes nothing."""
SEQUENCES = 64
"""Sequences of full length that the store has room for, if there is that much memory."""


class NativeDrafts:
    """One model that guesses, and its memory."""

    def __init__(self, model: TextLM, longest: int, memory: int | None = None) -> None:
        """`memory` in bytes for keys and values; None takes a sixteenth of the machine's at most."""
        self._model, self.longest = model, longest
        self._native = Native(model)
        self._limit = memory
        self._store: tuple[Store, Pages, list[Layer]] | None = None
        self._built: tuple[list, Guesser] | None = None
        self._at: Places | None = None

    @property
    @torch.no_grad()  # weights that are still to be trained fit no kernel otherwise
    def fits(self) -> bool:
        """Whether every layer can be computed natively, as it is now, and the head is plain."""
        plain = type(self._model.lm_head) is nn.Linear
        return (
            plain
            and self._native.fits
            and len(self._native.fused()) == len(self._model.model.layers)
        )

    def begin(self, ids: Sequence[int]) -> "NativeGuess":
        return NativeGuess(self, ids)

    def memory(self, ids: list[int]) -> Memory:
        """Of a new sequence."""
        store, pages, _ = self._opened()
        return Memory(store, pages, Chain(ids, store.layers.local_tokens))

    def propose(self, asked: Sequence[tuple["NativeGuess", int]]) -> list[Proposal]:
        """Guesses for several sequences, read together."""
        ready: list[NativeGuess] = []
        readers: list[Reader] = []
        _, pages, _ = self._opened()
        limit = self._model.config.text.max_position_embeddings
        for guess, count in asked:
            guess.guessed = []
            unread = guess.ids[guess.memory.computed :]
            count = max(0, min(count, self.longest, limit - len(guess.ids)))
            if not count:
                continue
            if len(unread) > PIECE:
                unread, count = unread[:PIECE], 0
            end = guess.memory.computed + len(unread) + max(count - 1, 0)
            if guess.memory.missing(end) > pages.available:
                continue
            guess.memory.grow(end)
            ready.append(guess)
            readers.append(guess.reader(unread, count, end))
        if ready:
            with torch.inference_mode(), cpu.alone():
                found = self._guesser()(readers, *self._tables(max(r.end for r in readers)))
            for guess, reader, tokens in zip(ready, readers, found, strict=True):
                guess.guessed = tokens
                # One token stays unread, so that there is always one to go on from.
                read = reader.place + len(reader.unread)
                guess.memory.advance(min(read, len(guess.ids) - 1), False)
        return [Proposal(list(guess.guessed)) for guess, _ in asked]

    def _opened(self) -> tuple[Store, Pages, list[Layer]]:
        if self._store is None:
            config, dtype = self._model.config.text, self._model.lm_head.weight.dtype
            store = Store(config, self._budget(), dtype, torch.device("cpu"))
            layers = [Layer(store, *place) for place in store.layers.places]
            self._store = store, Pages(store.pages), layers
        return self._store

    def _budget(self) -> int:
        if self._limit is not None:
            return self._limit
        config, weight = self._model.config.text, self._model.lm_head.weight
        kinds = config.num_hidden_layers
        position = 2 * kinds * config.num_key_value_heads * config.head_dim * weight.element_size()
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(machine // 16, SEQUENCES * config.max_position_embeddings * position)

    def _guesser(self) -> Guesser:
        """Made anew where a weight is another one than before."""
        model = self._model
        fused = self._native.fused()
        state = [*fused, *(w.data_ptr() for w in _ends(model))]
        if self._built is None or self._built[0] != state:
            _, _, layers = self._opened()
            parts = [
                (f.attend, f.feed, layer.memory) for f, layer in zip(fused, layers, strict=True)
            ]
            embed, gain, head = _ends(model)
            text = model.config.text
            own = Guesser(embed, gain, head, model.model.norm.eps, parts, text.attention_chunk_size)
            self._built = state, own
        return self._built[1]

    def _tables(self, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self._at is None or self._at.cos.shape[1] < end:
            self._at = Places(self._model.config.text, torch.arange(max(256, 2 * end))[None])
        temperature = self._at.temperature
        flat = None if temperature is None else temperature.flatten()
        return self._at.cos[0], self._at.sin[0], flat


class NativeGuess:
    """Guesses for one sequence."""

    def __init__(self, drafts: NativeDrafts, ids: Sequence[int]) -> None:
        self._drafts, self.ids = drafts, list(ids)
        self.memory = drafts.memory(self.ids)
        self.guessed: list[int] = []
        # Sequences end in many ways; however this one does, its pages go back.
        weakref.finalize(self, self.memory.release).atexit = False

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def propose(self, count: int, sampler: Sampler) -> Proposal:
        return self._drafts.propose([(self, count)])[0]

    def commit(self, tokens: Sequence[int]) -> None:
        read = self.memory.computed
        if self.guessed:  # all of ids was read, and the guesses but the last
            pairs = zip(self.guessed[:-1], tokens, strict=False)
            wrong = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            agreed = min(len(self.guessed) - 1, len(tokens)) if wrong is None else wrong
            read = len(self.ids) + agreed
        self.ids += tokens
        self.guessed = []
        self.memory.advance(min(read, len(self.ids) - 1), False)

    def reader(self, unread: Sequence[int], count: int, end: int) -> Reader:
        whole, local = self.memory.whole, self.memory.local
        return Reader(
            unread, self.memory.computed, count,
            whole and whole.slots(0, end),
            local and local.slots(local.first, end),
            local.first if local else 0,
        )  # fmt: skip


def _ends(model: TextLM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight


def together(drafts: NativeDrafts, asked: Sequence[Asked]) -> list[Proposal]:
    """The same for whatever drafts there are: those of `drafts` in one call, others one by one."""
    out: dict[int, Proposal] = {}
    mine = [
        (i, draft, count)
        for i, (draft, count, _) in enumerate(asked)
        if isinstance(draft, NativeGuess)
    ]
    proposals = drafts.propose([(draft, count) for _, draft, count in mine]) if mine else []
    out.update({i: proposal for (i, _, _), proposal in zip(mine, proposals, strict=True)})
    for i, (draft, count, sampler) in enumerate(asked):
        if i not in out:
            out[i] = draft.propose(count, sampler)
    return [out[i] for i in range(len(asked))]
