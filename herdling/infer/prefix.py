"""Names for what pages hold: a digest of everything that stands before and in them.

Two prompts share a page when their tokens up to its end are the same, their images have the same
pixels, and the same adapter reads them. Digests form a chain, one every `step` tokens.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from torch import Tensor


class Chain:
    """Digests of the prefixes of one sequence, made as far as they are asked for."""

    def __init__(
        self,
        ids: Sequence[int],
        step: int,
        adapter: str | None = None,
        tiles: Tensor | None = None,
        patch: int = -1,
        patches_a_tile: int = 1,
    ) -> None:
        """`ids` may grow later; `tiles` (n, 3, S, S) fill the tokens `patch` in order."""
        self._ids, self._step = ids, step
        self._digests = [hashlib.blake2b((adapter or "").encode(), digest_size=16).digest()]
        self._images = iter(()) if tiles is None else _of_tiles(tiles)
        self._patch, self._a_tile = patch, patches_a_tile
        self._patches = 0

    def at(self, length: int) -> bytes:
        """The digest of the first `length` tokens, a multiple of the step."""
        while len(self._digests) <= length // self._step:
            a = (len(self._digests) - 1) * self._step
            piece = self._ids[a : a + self._step]
            digest = hashlib.blake2b(self._digests[-1], digest_size=16)
            digest.update(array("q", piece).tobytes())
            for token in piece:
                if token == self._patch:
                    if self._patches % self._a_tile == 0:
                        digest.update(next(self._images, b""))
                    self._patches += 1
            self._digests.append(digest.digest())
        return self._digests[length // self._step]


def _of_tiles(tiles: Tensor) -> Iterator[bytes]:
    for tile in tiles:
        pixels = tile.float().contiguous().cpu().numpy()
        yield hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
