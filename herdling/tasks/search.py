"""Facts to be looked up: search a small library, read the page found, answer from it.

    user       What is the currency of Peru?
    assistant  [search(q="Peru")]
    tool       Peru: currency Peruvian Sol, language Spanish
    assistant  Peruvian Sol

A page for each of some 700 territories and languages that CLDR knows; a test item asks about a name
that no train item asks about, so that looking it up is learned and not the fact. Chance: the mean
share of the commonest answer of each kind of question; nearly all of it the Euro and English.
"""

import functools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from babel import Locale
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.tasks.base import Item, ask, exact, normalise
from herdling.tasks.tools import Tool, answer_calls

_WORDINGS = {
    "currency": ("What is the currency of {}?", "Which currency for {}?"),
    "language": ("What is the language of {}?", "Which language for {}?"),
    "code": ("What is the code of {}?", "Which code for {}?"),
    "German": ("What is {} in German?", "What is the German name of {}?"),
    "French": ("What is {} in French?", "What is the French name of {}?"),
}
_LONGEST_TITLE, _LONGEST_PAGE = 20, 64
"""Characters; a conversation then nearly always fits into 256 tokens of a small vocabulary."""
_WORD = re.compile(r"\w+")


class Search:
    name = "search"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.titles = {
            kind: [t for t, page in facts().items() if kind in page] for kind in _WORDINGS
        }
        shares = []
        for kind, titles in self.titles.items():
            answers = Counter(normalise(facts()[title][kind]) for title in titles)
            shares.append(max(answers.values()) / len(titles))
        self.chance = sum(shares) / len(shares)

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[str, str, str]:
            kind = rng.choice(tuple(_WORDINGS))
            title = rng.choice(self.titles[kind])
            return title, kind, one_of(rng, *_WORDINGS[kind]).format(title)

        title, kind, question = draw(
            self.name, self.seed, split, index, make, lambda made: f"page {made[0]}"
        )
        page = facts()[title]
        # The further into the page the answer stands, the more there is to pass over.
        difficulty = list(page).index(kind) / 2
        turns = tuple(SEARCH.call(title))
        return Item(ask(question), page[kind], difficulty, title, (SEARCH.schema,), turns)

    def respond(self, item: Item, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return answer_calls([SEARCH], messages)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)


class Library:
    """Pages that can be searched by their words, as a search engine of one line would."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        """Title -> text; a word of the title counts four times as much as one of the text."""
        self.pages = dict(pages)
        self._weights: dict[str, dict[str, float]] = defaultdict(dict)
        for title, text in self.pages.items():
            for word in _words(text):
                self._weights[word][title] = 1.0
            for word in _words(title):
                self._weights[word][title] = 4.0

    def find(self, query: str) -> str | None:
        """The page with most of the query's words, rare words first; None if it has none of them.

        Of equals the shorter title wins, then the first in the alphabet.
        """
        scores: dict[str, float] = defaultdict(float)
        for word in _words(query):
            holders = self._weights.get(word, {})
            for title, weight in holders.items():
                scores[title] += weight / len(holders)
        if not scores:
            return None
        best = max(scores, key=lambda title: (scores[title], -len(title), title))
        return self.pages[best]


@functools.cache
def facts() -> dict[str, dict[str, str]]:
    """Title of a page -> what it says, by kind of question."""
    found: dict[str, dict[str, str]] = {}
    for title, page in (*_territories(), *_languages()):
        # A name that is the same in English can be had by repeating the question.
        page = {kind: said for kind, said in page.items() if normalise(said) != normalise(title)}
        fits = len(title) <= _LONGEST_TITLE and len(_text(title, page)) <= _LONGEST_PAGE
        # Of a territory and a language of the same name the territory has the page.
        if fits and title not in found:
            found[title] = page
    return found


def _territories() -> Iterator[tuple[str, dict[str, str]]]:
    english, german = Locale.parse("en"), Locale.parse("de")
    for code, title in sorted(english.territories.items()):
        money = get_territory_currencies(code) if len(code) == 2 else []
        tongues = get_official_languages(code, de_facto=True) if money else ()
        if known := [tongue for tongue in tongues if tongue in english.languages]:
            page = {
                "currency": english.currencies[money[0]],
                "language": english.languages[known[0]],
                "German": german.territories.get(code, title),
            }
            yield title, page


def _languages() -> Iterator[tuple[str, dict[str, str]]]:
    english, german, french = (Locale.parse(code).languages for code in ("en", "de", "fr"))
    for code, title in sorted(english.items()):
        if code.isalpha() and code in german and code in french:
            yield title, {"code": code, "German": german[code], "French": french[code]}


def _text(title: str, page: Mapping[str, str]) -> str:
    return f"{title}: " + ", ".join(f"{kind} {said}" for kind, said in page.items())


@functools.cache
def library() -> Library:
    return Library({title: _text(title, page) for title, page in facts().items()})


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


def _search(query: str) -> str:
    return library().find(query) or "nothing found"


SEARCH = Tool("search", ("q",), _search)
