"""Give the answer in the form that is asked for: one word, a sentence, or JSON.

What is asked stands in the question itself ("Ana's hat is red. What colour is it?"), so that the task
measures obedience and not knowledge. A thing with its colour and form is in one split. Chance: a
guess of form and colour.
"""

import json
import random

from herdling.data.drawing import one_of
from herdling.data.split import check_place, draw
from herdling.tasks.base import Item, ask, exact

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
THINGS = ("ball", "car", "door", "hat", "cup", "house", "boat", "coat", "lamp", "chair", "bag", "bird",
          "shoe", "box", "pen", "fish", "bike", "wall", "ring", "cat")  # fmt: skip
OWNERS = ("Ana", "Ben", "Eva", "Ida", "Kim", "Leo", "Max", "Mia", "Noa", "Tom", "Uma", "Zoe")
FORMS = {
    "word": ("Answer in one word.", "Only the word.", "Be brief."),
    "sentence": ("Answer in a sentence.", "Use a whole sentence.", "Say it in full."),
    "json": ("Answer as JSON.", "Reply in JSON.", "Give a JSON object."),
}


def written(form: str, thing: str, colour: str) -> str:
    """The answer in a form."""
    if form == "json":
        return json.dumps({"colour": colour})
    return f"{thing} is {colour}." if form == "sentence" else colour


class Form:
    name = "form"
    chance = 1 / (len(FORMS) * len(COLOURS))

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def item(self, index: int, split: str) -> Item:
        check_place(split, index)
        # What the answer is first and apart: a split's share of the things must not change its odds.
        pick = random.Random(f"{self.name}/{self.seed}/{split}/{index}/answer")
        form, colour = pick.choice(list(FORMS)), pick.choice(COLOURS)

        def make(rng: random.Random) -> tuple[str, str]:
            thing = f"{one_of(rng, *OWNERS)}'s {one_of(rng, *THINGS)}"
            wording = one_of(
                rng, "What colour is it?", "Which colour has it?", "And what colour is that?"
            )
            return thing, f"{thing} is {colour}. {wording} {one_of(rng, *FORMS[form])}"

        thing, question = draw(
            f"{self.name}/{form}/{colour}", self.seed, split, index, make, lambda made: f"{form}/{made[0]}/{colour}"
        )  # fmt: skip
        difficulty = list(FORMS).index(form) / 2
        return Item(
            ask(question), written(form, thing, colour), difficulty, f"{form}/{thing}/{colour}"
        )

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)

    def worse(self, item: Item) -> str:
        """The same colour in another form."""
        form, thing, colour = item.key.split("/")
        other = random.Random(item.key).choice([f for f in FORMS if f != form])
        return written(other, thing, colour)
