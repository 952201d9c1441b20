"""Facts about countries: their names in other languages, currencies and languages, from CLDR.

Nobody can infer that Germany is Allemagne in French, so a fact itself cannot be held out. What is
held out is a way of asking for it: each fact has four wordings, and names are asked in both
directions; a question's text decides its split. A test question is about a fact that training has
(but for a few in a thousand) asked in other words or in the other direction. The pages of
`herdling.data.multilingual` say the same facts as lists.

Chance: the four kinds of question are equally likely and their kind shows, so the mean share of the
commonest answer of each kind; mostly the euro and English.
"""

import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from herdling.data.multilingual import check_languages
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact, normalise

COUNTRIES = (
    "AR", "AT", "AU", "BG", "BR", "CA", "CH", "CL", "CN", "CZ", "DE", "DK", "EG", "ES", "ET",
    "FI", "FR", "GR", "HU", "ID", "IN", "IT", "JP", "KE", "KR", "MA", "MX", "NG", "NL", "NO",
    "NZ", "PE", "PL", "PT", "RO", "RU", "SE", "TH", "TR", "UA", "US", "VN", "ZA",
)  # fmt: skip
LANGUAGES = ("de", "es", "fr", "it", "nl", "pl")

_WORDINGS = {
    "name": (
        "What is {country} called in {language}?",
        "How do you say {country} in {language}?",
        "Translate {country} into {language}.",
        "What is the {language} name of {country}?",
    ),
    "country": (
        "Which country is called {name} in {language}?",
        "What does {name} mean in {language}?",
        "Translate {name} from {language}.",
        "{name} is the {language} name of which country?",
    ),
    "currency": (
        "What is the currency of {country}?",
        "Which currency is used in {country}?",
        "What do people pay with in {country}?",
        "What money does {country} have?",
    ),
    "language": (
        "What is the official language of {country}?",
        "Which language is official in {country}?",
        "In which language are the laws of {country}?",
        "What language does {country} use?",
    ),
}


@dataclass(frozen=True)
class _Asked:
    kind: str
    question: str
    answer: str
    difficulty: float
    """How the wording ranks: 0 for the first, 1 for the last."""


class CldrNames:
    name = "cldr_names"

    def __init__(
        self,
        seed: int = 0,
        languages: Sequence[str] = LANGUAGES,
        countries: Sequence[str] = COUNTRIES,
        kinds: Sequence[str] = tuple(_WORDINGS),
    ) -> None:
        """CLDR codes of `languages` and `countries`; `kinds` of name, country, currency, language."""
        unknown = set(kinds) - _WORDINGS.keys()
        if unknown or not kinds:
            raise ConfigError(f"kinds is {tuple(kinds)}; use some of {', '.join(_WORDINGS)}")
        check_languages(languages)
        self.seed = seed
        table = questions(tuple(languages), tuple(countries))
        self.questions = {kind: table[kind] for kind in kinds}
        empty = [kind for kind, asked in self.questions.items() if not asked]
        if empty:
            raise ConfigError(f"countries and languages give nothing to ask about {empty[0]}")
        self.chance = sum(map(_best_guess, self.questions.values())) / len(self.questions)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> _Asked:
            return rng.choice(self.questions[rng.choice(list(self.questions))])

        made = draw(self.name, self.seed, split, index, make, lambda asked: asked.question)
        return Item(ask(made.question), made.answer, made.difficulty, made.question)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


def _best_guess(asked: Sequence[_Asked]) -> float:
    return max(Counter(normalise(one.answer) for one in asked).values()) / len(asked)


@functools.lru_cache(maxsize=8)
def questions(
    languages: tuple[str, ...], countries: tuple[str, ...]
) -> dict[str, tuple[_Asked, ...]]:
    """Every question of every kind, each in all its wordings."""
    found: dict[str, list[_Asked]] = {kind: [] for kind in _WORDINGS}
    for kind, answer, words in _facts(languages, countries):
        wordings = _WORDINGS[kind]
        for i, wording in enumerate(wordings):
            rank = i / (len(wordings) - 1)
            found[kind].append(_Asked(kind, wording.format(**words), answer, rank))
    return {kind: tuple(asked) for kind, asked in found.items()}


def _facts(
    languages: tuple[str, ...], countries: tuple[str, ...]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(kind of question, answer, words that fill the wordings)."""
    english = Locale.parse("en")
    for code in countries:
        if code not in english.territories:
            raise ConfigError(f"country {code!r} is unknown to CLDR; use codes such as DE")
        country = english.territories[code]
        for language in languages:
            name = Locale.parse(language).territories.get(code, country)
            # A name that is the same in English can be had by repeating the question.
            if normalise(name) != normalise(country):
                words = {"country": country, "name": name, "language": english.languages[language]}
                yield "name", name, words
                yield "country", country, words
        currencies = get_territory_currencies(code)
        if len(currencies) == 1:
            yield "currency", english.currencies[currencies[0]], {"country": country}
        official = get_official_languages(code)
        if len(official) == 1 and official[0] in english.languages:
            yield "language", english.languages[official[0]], {"country": country}
