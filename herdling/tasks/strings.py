"""Spell a made-up word backwards, write it in capitals, count one of its letters.

A word is in one split for all three. Capitals are graded as capitals. Chance: nothing to guess for
the first two; counts of 0, 1 and 2 are equally likely; so (0 + 0 + 1/3) / 3 = 1/9.
"""

import random
from dataclasses import dataclass

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact

_CONSONANTS, _VOWELS = "bcdfghjklmnprstvz", "aeiou"
_SHORTEST = 3


@dataclass(frozen=True)
class _Made:
    word: str
    kind: str
    question: str
    answer: str


class Strings:
    name = "strings"
    chance = 1 / 9

    def __init__(self, seed: int = 0, longest: int = 6) -> None:
        """Words of 3 to `longest` letters, consonants and vowels in turn."""
        if longest < 4:
            raise ConfigError(
                f"longest is {longest}; it must be at least 4, to count letters twice"
            )
        self.seed, self.longest = seed, longest

    def item(self, index: int, split: str) -> Item:
        made = draw(self.name, self.seed, split, index, self._make, lambda made: made.word)
        difficulty = (len(made.word) - _SHORTEST) / (self.longest - _SHORTEST)
        return Item(ask(made.question), made.answer, difficulty, made.word)

    def grade(self, item: Item, reply: str) -> float:
        if item.answer.isupper():
            return float(reply.strip().removesuffix(".") == item.answer)
        return exact(item.answer, reply)

    def _make(self, rng: random.Random) -> _Made:
        kind = rng.choice(("reverse", "upper", "count"))
        word = self._word(rng)
        if kind == "reverse":
            wording = one_of(rng, "Spell {} backwards.", "Reverse the word {}.")
            return _Made(word, kind, wording.format(word), word[::-1])
        if kind == "upper":
            wording = one_of(rng, "Write {} in capitals.", "Put {} in upper case.")
            return _Made(word, kind, wording.format(word), word.upper())
        times = rng.randrange(3)
        letters = _with_count(word, times)
        while not letters:
            word = self._word(rng)
            letters = _with_count(word, times)
        wording = one_of(rng, "How many times is {} in {}?", "Count the letter {} in {}.")
        return _Made(word, kind, wording.format(rng.choice(letters), word), str(times))

    def _word(self, rng: random.Random) -> str:
        """No palindrome: repeating it would spell it backwards."""
        word = ""
        while word == word[::-1]:
            length, first = rng.randint(_SHORTEST, self.longest), rng.randrange(2)
            sets = (_CONSONANTS, _VOWELS)
            word = "".join(rng.choice(sets[(first + i) % 2]) for i in range(length))
        return word


def _with_count(word: str, times: int) -> list[str]:
    return [letter for letter in _CONSONANTS + _VOWELS if word.count(letter) == times]
