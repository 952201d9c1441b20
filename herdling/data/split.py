"""Which of train, validation and test a piece of content belongs to: decided by its hash alone.

Because content decides, the same number, word or scene lands in the same split whatever the seed,
the index or the recipe that made it, so nothing in the test split is ever trained on.
"""

import hashlib
import random
from collections.abc import Callable
from typing import TypeVar

from herdling.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
_TRIES = 10_000
T = TypeVar("T")


def split_of(content: str) -> str:
    """The split of `content`: 80 % train, 10 % validation, 10 % test, by BLAKE2 of its UTF-8."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") % 10
    return "test" if share == 0 else "validation" if share == 1 else "train"


def check_place(split: str, index: int) -> None:
    """Raise ConfigError unless `split` is one of SPLITS and `index` is not negative."""
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; use one of {', '.join(SPLITS)}")
    if index < 0:
        raise ConfigError(f"index is {index}; it must be 0 or more")


def draw(
    name: str,
    seed: int,
    split: str,
    index: int,
    make: Callable[[random.Random], T],
    content: Callable[[T], str],
) -> T:
    """The first thing `make` draws whose content belongs to `split`.

    A pure function of (name, seed, split, index): one generator is seeded from these four and
    handed to `make` again and again (1.25 times on average for train, 10 for the others), so
    `make` should be cheap and leave rendering for later. `content(thing)` names what must not
    be shared between splits. Raises DataError when 10,000 draws gave nothing in `split`.
    """
    check_place(split, index)
    rng = random.Random(f"{name}/{seed}/{split}/{index}")
    for _ in range(_TRIES):
        thing = make(rng)
        if split_of(content(thing)) == split:
            return thing
    raise DataError(f"{name}: {_TRIES} draws gave nothing in split {split!r}; widen its choices")
