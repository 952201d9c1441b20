"""Say which language a name is written in; answer: the language's English name.

The names are CLDR's for countries, languages, scripts and currencies; those that two of the
languages share are left out. Each name is in one split, so the task asks for a feeling for the
languages, not for memory (as far as the pages of `herdling.data.multilingual` go: these are split
page by page). Chance: the languages are equally likely, so 1 / how many there are.
"""

import functools
import random
from collections import Counter
from collections.abc import Sequence

from babel import Locale

from herdling.data.drawing import one_of
from herdling.data.multilingual import NAMES, check_languages, own_data
from herdling.data.split import check_place, draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact, normalise

LANGUAGES = ("de", "en", "es", "fi", "fr", "ja", "pl", "ru")


class Languages:
    name = "languages"

    def __init__(self, seed: int = 0, languages: Sequence[str] = LANGUAGES) -> None:
        if len(set(languages)) < 2:
            raise ConfigError(f"languages is {tuple(languages)}; name at least two")
        check_languages(languages)
        self.seed = seed
        self.names = names_by_language(tuple(languages))
        self.chance = 1 / len(self.names)

    def item(self, index: int, split: str) -> Item:
        check_place(split, index)
        # The language first and apart: the split's share of its names must not change its odds.
        pick = random.Random(f"{self.name}/{self.seed}/{split}/{index}/language")
        language = pick.choice(list(self.names))

        def make(rng: random.Random) -> tuple[str, str]:
            name = rng.choice(self.names[language])
            wording = one_of(rng, "Which language is this: {}", "What language is {} written in?")
            return name, wording.format(name)

        name, question = draw(
            f"{self.name}/{language}", self.seed, split, index, make, lambda m: normalise(m[0])
        )
        difficulty = 1 / len(name)  # a short name tells less
        return Item(ask(question), language, difficulty, normalise(name))

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


@functools.lru_cache(maxsize=8)
def names_by_language(languages: tuple[str, ...]) -> dict[str, list[str]]:
    """Names that only one of the languages uses, by the language's English name."""
    found: dict[str, list[str]] = {}
    for language in languages:
        data = own_data(language)
        every = {name for section in NAMES for name in data.get(section, {}).values()}
        english = Locale.parse(language).get_display_name("en")
        found[str(english)] = sorted(name for name in every if len(name) >= 3)
    uses = Counter(normalise(name) for names in found.values() for name in {*names})
    return {
        language: [name for name in names if uses[normalise(name)] == 1]
        for language, names in found.items()
    }
