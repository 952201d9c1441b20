"""Answer in the form that is asked for: as JSON with given keys, in n words, in a given language.

    Name: Ana, age: 31. Write this as JSON with the keys age and name.     {"age": 31, "name": "Ana"}
    Choose 2 of these words: lamp, tree, door, sand.                       lamp tree
    Which month comes after May? Answer in French.                         juin

Chance: nothing to guess for the first two (for the second, words of the question must be repeated); one
of the months or weekdays for the third, so (0 + 0 + (1/12 + 1/7) / 2) / 3.
"""

import json
import random
import re
from collections.abc import Callable

from babel import Locale

from herdling.data.drawing import one_of
from herdling.data.pages import words
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import LONGEST_REPLY, Item, ask, exact
from herdling.tasks.graders import as_json

LANGUAGES = ("de", "es", "fi", "fr", "it", "nl", "pl", "pt", "sv")
_NAMES = ("Ana", "Ben", "Eva", "Ida", "Kim", "Leo", "Max", "Mia", "Noa", "Tom", "Uma", "Zoe")
_TOWNS = ("Bonn", "Cork", "Graz", "Lima", "Oslo", "Pisa", "Riga", "Rome", "Turin", "York")

_Made = tuple[str, str, str, float]
"""Key, question, answer, difficulty."""


class Instructions:
    name = "instructions"

    def __init__(
        self, seed: int = 0, kinds: tuple[str, ...] = ("json", "words", "language")
    ) -> None:
        chances = {"json": 0.0, "words": 0.0, "language": (1 / 12 + 1 / 7) / 2}
        if not kinds or set(kinds) - chances.keys():
            raise ConfigError(f"kinds is {kinds}; use some of {', '.join(chances)}")
        self.seed, self.kinds = seed, kinds
        self.chance = sum(chances[kind] for kind in kinds) / len(kinds)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> _Made:
            return _MAKERS[rng.choice(self.kinds)](rng)

        made = draw(self.name, self.seed, split, index, make, lambda made: made[0])
        key, question, answer, difficulty = made
        return Item(ask(question), answer, difficulty, key)

    def grade(self, item: Item, reply: str) -> float:
        kind, _, rest = item.key.partition(" ")
        if kind == "json":
            return as_json({"answer": json.loads(item.answer)}, reply)
        if kind == "words":
            return _chosen(len(item.answer.split()), rest.split(), reply)
        return exact(item.answer, reply)


def _json(rng: random.Random) -> _Made:
    facts = {"name": rng.choice(_NAMES), "age": rng.randint(1, 99), "town": rng.choice(_TOWNS)}
    keys = rng.sample(tuple(facts), rng.randint(2, 3))
    said = ", ".join(f"{key}: {facts[key]}" for key in sorted(keys))
    asked = one_of(rng, "Write this as JSON with the keys {}.", "Answer in JSON with the keys {}.")
    question = f"{said[0].upper()}{said[1:]}. {asked.format(' and '.join(keys))}"
    answer = json.dumps({key: facts[key] for key in keys})
    return f"json {said}", question, answer, (len(keys) - 2) * 0.5


def _words(rng: random.Random) -> _Made:
    """The key does not hold how many are wanted: the same words are in one split for any number."""
    given = rng.sample(words("train", 5), rng.randint(4, 6))
    count = rng.randint(2, 3)
    asked = one_of(rng, "Choose {} of these words: {}.", "Answer with {} of these words: {}.")
    question = asked.format(count, ", ".join(given))
    return f"words {' '.join(given)}", question, " ".join(given[:count]), (count - 1) / 2


def _language(rng: random.Random) -> _Made:
    language = rng.choice(LANGUAGES)
    english, other = Locale.parse("en"), Locale.parse(language)
    what, count = rng.choice((("month", 12), ("day", 7)))
    place, after = rng.randrange(count), rng.random() < 0.5
    asked = (place + (1 if after else -1)) % count
    shift = 1 if what == "month" else 0

    def name(locale: Locale, i: int) -> str:
        table = locale.months if what == "month" else locale.days
        return table["stand-alone"]["wide"][i + shift]

    question = (
        f"Which {what} comes {'after' if after else 'before'} {name(english, place)}? "
        f"Answer in {other.get_display_name('en')}."
    )
    return f"language {question}", question, name(other, asked), 0.5 + 0.5 * (what == "month")


_MAKERS: dict[str, Callable[[random.Random], _Made]] = {
    "json": _json,
    "words": _words,
    "language": _language,
}


def _chosen(count: int, given: list[str], reply: str) -> float:
    """1.0 for `count` different words of `given` and nothing else, spaces or commas between."""
    text = reply.strip().removesuffix(".").casefold() if len(reply) <= LONGEST_REPLY else ""
    chosen = [word for word in re.split(r"[\s,]+", text) if word]
    right = len(chosen) == len(set(chosen)) == count and set(chosen) <= set(given)
    return float(right)
