"""Words from one of ten languages into another, from CLDR: months, weekdays, languages and countries.

What is held out is a pair of languages for a word: training has the word between other pairs, so a test
item is solved by putting two of these together. Chance: the commonest word of each language asked for.
"""

import functools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from babel import Locale

from herdling.data.drawing import one_of
from herdling.data.multilingual import check_languages
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact, normalise

LANGUAGES = ("de", "en", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")
_COUNTRIES = ("AT", "BR", "CH", "DE", "EG", "ES", "FI", "FR", "GR", "IT", "JP", "NL", "NO", "PL",
              "SE", "TR", "UA", "US")  # fmt: skip
_TONGUES = ("ar", "da", "el", "es", "fi", "fr", "hu", "it", "ja", "nl", "pl", "pt", "ru", "tr")


@dataclass(frozen=True)
class _Pair:
    word: str
    answer: str
    source: str
    target: str
    """Languages by their English names."""

    @property
    def content(self) -> str:
        return f"{self.word} {self.source} {self.target}"


class Translation:
    name = "translation"

    def __init__(self, seed: int = 0, languages: Sequence[str] = LANGUAGES) -> None:
        if len(set(languages)) < 3:
            raise ConfigError(f"languages is {tuple(languages)}; name at least three")
        check_languages(languages)
        self.seed = seed
        self.pairs = pairs(tuple(languages))
        counts = Counter((pair.target, normalise(pair.answer)) for pair in self.pairs)
        best: Counter[str] = Counter()
        for (target, _), count in counts.items():
            best[target] = max(best[target], count)
        self.chance = best.total() / len(self.pairs)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[_Pair, str]:
            pair = rng.choice(self.pairs)
            said = one_of(rng, "Translate {} from {} into {}.", "{} is {}. What is it in {}?")
            return pair, said.format(pair.word, pair.source, pair.target)

        pair, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        # English is in every lesson; a pair without it has to be put together.
        difficulty = 0.0 if "English" in (pair.source, pair.target) else 1.0
        return Item(ask(question), pair.answer, difficulty, pair.content)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


@functools.lru_cache(maxsize=8)
def pairs(languages: tuple[str, ...]) -> tuple[_Pair, ...]:
    """Every word between every two languages that have different words for it."""
    tables = {code: _words(code) for code in languages}
    names = {code: str(Locale.parse(code).get_display_name("en")) for code in languages}
    found: list[_Pair] = []
    for source, words in tables.items():
        meanings = Counter(normalise(word) for word in words)
        for target, others in tables.items():
            for word, answer in zip(words, others, strict=True):
                # A word of two meanings has two answers; one that is the same needs no translation.
                if meanings[normalise(word)] == 1 and normalise(word) != normalise(answer):
                    found.append(_Pair(word, answer, names[source], names[target]))
    return tuple(found)


def _words(code: str) -> list[str]:
    """The same things in the same order for each language."""
    locale = Locale.parse(code)
    months, days = locale.months["stand-alone"]["wide"], locale.days["stand-alone"]["wide"]
    return [
        *(months[i] for i in range(1, 13)),
        *(days[i] for i in range(7)),
        *(locale.languages[tongue] for tongue in _TONGUES),
        *(locale.territories[country] for country in _COUNTRIES),
    ]
