"""A cache that takes back its last tokens, also over the boundary of a chunk.

`Cache` forgets a chunk when it ends. Tokens that are only guessed may have to go again, and then the
chunk they ended is needed: so here local layers keep it until `slack` tokens lie behind the boundary,
that is at most a chunk, `slack` tokens and one call more. For rows of one document each, without
padding.
"""

from torch import Tensor

from herdling.errors import InputError
from herdling.model.cache import Cache, LayerCache
from herdling.model.config import TextConfig


class RewindCache(Cache):
    """Use as a `Cache`; `rewind(length)` makes it what it was at that length."""

    def __init__(self, config: TextConfig, slack: int) -> None:
        """`slack` is how many tokens can be taken back at any time."""
        super().__init__(config)
        self.slack, self._most = slack, 0
        self._stores = [
            _Store(self.chunk if config.is_local(i) else None)
            for i in range(config.num_hidden_layers)
        ]
        self.layers = list[LayerCache](self._stores)

    def record(self, positions: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        raise InputError("a RewindCache has no place for padding or packing; use Cache")

    def advance(self, columns: int) -> None:
        self.length += columns
        self._most = max(self._most, self.length)
        if self.chunk is None:
            return
        self.local_start = self.length // self.chunk * self.chunk
        needed = max(0, self._most - self.slack) // self.chunk * self.chunk
        for store in self._stores:
            if store.window and store.first < needed:
                store.drop(needed - store.first)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises InputError further back than `slack` tokens before the longest it has been.
        """
        back = self.length - length
        if not max(0, self._most - self.slack) <= length <= self.length:
            raise InputError(f"cannot take back {back} of {self.length} tokens; slack={self.slack}")
        self.length = length
        if self.chunk is not None:
            self.local_start = length // self.chunk * self.chunk
        for store in self._stores:
            store.held -= back


class _Store(LayerCache):
    """Columns from `first` on; a layer with chunks shows those of the running chunk."""

    def __init__(self, window: int | None) -> None:
        super().__init__(None)  # this class decides what to forget
        self.window, self.first = window, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.first + self.held
        start = end // self.window * self.window - self.first if self.window else 0
        k, v = super().extend(k, v)
        return k[:, start:], v[:, start:]

    def drop(self, columns: int) -> None:
        super().drop(columns)
        self.first += columns
