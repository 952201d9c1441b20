"""Read a word from a rendered page of one or more lines; answer: the word.

Chance: one of the words of the test split, known by heart.
"""

import random

from herdling.data.pages import Document, make_document, word_wording, words
from herdling.data.split import draw
from herdling.tasks.base import Item, ask, exact


class ReadWord:
    """Which word is this? Or, with several `lines`: what is the second word?

    At 32 pixels one word of four letters is legible; at 64 three lines of six.
    """

    name = "read_word"

    def __init__(self, seed: int = 0, side: int = 32, lines: int = 1, longest: int = 4) -> None:
        self.seed, self.side, self.lines, self.longest = seed, side, lines, longest
        self.chance = 1 / len(words("test", longest))

    def item(self, index: int, split: str) -> Item:
        def make(rng: random.Random) -> tuple[Document, int, str]:
            document = make_document(rng, self.lines, self.longest)
            line = rng.randrange(self.lines)
            return document, line, word_wording(rng, line, self.lines)

        document, line, question = draw(
            self.name, self.seed, split, index, make, lambda made: made[0].content
        )
        word = document.page.lines[line]
        messages = ask(question, document.page.draw(self.side))
        return Item(messages, word, min(1.0, len(word) / self.longest), f"word {word}")

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)
