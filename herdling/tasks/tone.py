"""Answer in the language of the question, plainly: no English in its place, no lecture before it.

Questions are about the order of days and months in eight languages, names from CLDR. Chance: one of
the names of the kind that the question shows, all equally likely.
"""

import functools
import random

from babel import Locale

from herdling.data.split import check_place, draw
from herdling.tasks.base import Item, ask, exact

AFTER = {
    "de": ("Was kommt nach {}?", "Was kommt vor {}?"),
    "en": ("What comes after {}?", "What comes before {}?"),
    "es": ("\u00bfQu\u00e9 viene despu\u00e9s de {}?", "\u00bfQu\u00e9 viene antes de {}?"),
    "fr": ("Qu'est-ce qui vient apr\u00e8s {} ?", "Qu'est-ce qui vient avant {} ?"),
    "it": ("Cosa viene dopo {}?", "Cosa viene prima di {}?"),
    "nl": ("Wat komt er na {}?", "Wat komt er voor {}?"),
    "pt": ("O que vem depois de {}?", "O que vem antes de {}?"),
    "sv": ("Vad kommer efter {}?", "Vad kommer f\u00f6re {}?"),
}  # fmt: skip
"""After and before, by language."""
_LECTURES = ("As an AI, I should say first that I may be wrong. ", "Great question! Please note: ")


@functools.lru_cache(maxsize=16)
def cycles(language: str) -> tuple[tuple[str, ...], ...]:
    """The days and the months of a language, in order."""
    locale = Locale.parse(language)
    days = locale.days["stand-alone"]["wide"]
    months = locale.months["stand-alone"]["wide"]
    return tuple(days[i] for i in range(7)), tuple(months[i] for i in range(1, 13))


class Tone:
    name = "tone"
    chance = (1 / 7 + 1 / 12) / 2

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def item(self, index: int, split: str) -> Item:
        check_place(split, index)
        language, kind, place, step = draw(
            self.name,
            self.seed,
            split,
            index,
            lambda rng: (rng.choice(list(AFTER)), (k := rng.randrange(2)), rng.randrange((7, 12)[k]), rng.randrange(2)),
            str,
        )  # fmt: skip
        names = cycles(language)[kind]
        answer = names[(place + (1, -1)[step]) % len(names)]
        question = AFTER[language][step].format(names[place])
        return Item(ask(question), answer, kind / 2, str((language, kind, place, step)))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)

    def worse(self, item: Item) -> str:
        """The right name in English, or with a lecture before it."""
        rng = random.Random(item.key)
        english = _english(item.answer)
        if english is not None and rng.random() < 0.5:
            return english
        return rng.choice(_LECTURES) + item.answer


def _english(name: str) -> str | None:
    """The English name of a day or month; None where it is the same, or English already."""
    for language in AFTER:
        for own, english in zip(cycles(language), cycles("en"), strict=True):
            if language != "en" and name in own:
                found = english[own.index(name)]
                return None if found.casefold() == name.casefold() else found
    return None
