"""Sums too large for a small head, with a calculator: call it, read the result, answer with it.

    user       What is 47 * 83 - 12?
    assistant  [calc(x="47 * 83 - 12")]
    tool       3889
    assistant  3889

Chance: all but the last number given, every last number gives another result, so a blind guess is
right at most once in as many numbers as there are: 1/90 by default.
"""

import ast
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from herdling.data.drawing import one_of
from herdling.data.split import draw
from herdling.errors import ConfigError
from herdling.tasks.base import Item, ask, exact
from herdling.tasks.tools import Tool, answer_calls

_LONGEST = 200
_MOST_DIGITS = 60
_MOST_POWER = 64


class Calculator:
    name = "calculator"

    def __init__(self, seed: int = 0, steps: int = 2, digits: int = 2) -> None:
        """1 to `steps` operations (at most one product) on numbers of `digits` digits."""
        if not 1 <= steps <= 8 or not 2 <= digits <= 9:
            raise ConfigError(f"steps is {steps} and digits {digits}; use 1..8 and 2..9")
        self.seed, self.steps, self.digits = seed, steps, digits
        self.chance = 1 / (9 * 10 ** (digits - 1))

    def item(self, index: int, split: str) -> Item:
        made = draw(self.name, self.seed, split, index, self._make, lambda made: made[1])
        steps, expression, question = made
        difficulty = (steps - 1) / max(1, self.steps - 1)
        turns = tuple(CALC.call(expression))
        return Item(
            ask(question), evaluate(expression), difficulty, expression, (CALC.schema,), turns
        )

    def respond(self, item: Item, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return answer_calls([CALC], messages)

    def grade(self, item: Item, reply: str) -> float:
        return exact(item.answer, reply)

    def _make(self, rng: random.Random) -> tuple[int, str, str]:
        steps = rng.randint(1, self.steps)
        low = 10 ** (self.digits - 1)
        numbers = [str(rng.randrange(low, 10 * low)) for _ in range(steps + 1)]
        signs = [rng.choice("+-") for _ in range(steps)]
        if steps == 1 or rng.random() < 0.5:
            signs[rng.randrange(steps)] = "*"
        expression = numbers[0]
        for sign, number in zip(signs, numbers[1:], strict=True):
            expression += f" {sign} {number}"
        wording = one_of(rng, "What is {}?", "Calculate {}.", "How much is {}?", "Work out {}.")
        return steps, expression, wording.format(expression)


def evaluate(expression: str) -> str:
    """The value of + - * / ** and brackets on numbers, exactly: a whole number, a decimal of up to
    ten places, or else rounded to ten.

    Raises ValueError, saying what is wrong, for anything else and for numbers beyond 60 digits.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"more than {_LONGEST} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not an expression of numbers and + - * / ** ( )") from None
    value = _value(tree.body)
    if value.denominator == 1:
        return str(value.numerator)
    whole = round(value * 10**10)
    text = f"{abs(whole):011d}"
    return ("-" if whole < 0 else "") + f"{text[:-10]}.{text[-10:]}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            try:
                found = Fraction(str(number))  # 0.1 is a tenth
            except ValueError:
                raise ValueError("a number is too large") from None
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            found = -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            found = _value(inner)
        case ast.BinOp(left=left, op=op, right=right):
            found = _apply(op, _value(left), _value(right))
        case _:
            raise ValueError("not an expression of numbers and + - * / ** ( )")
    if max(abs(found.numerator), found.denominator) >= 10**_MOST_DIGITS:
        raise ValueError("a number is too large")
    return found


def _apply(op: ast.operator, a: Fraction, b: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div() | ast.Pow() if b == 0 and isinstance(op, ast.Div):
            raise ValueError("division by zero")
        case ast.Div():
            return a / b
        case ast.Pow() if b.denominator == 1 and abs(b) <= _MOST_POWER and (a or b >= 0):
            return a**b.numerator
    raise ValueError("not an expression of numbers and + - * / ** ( )")


CALC = Tool("calc", ("x",), evaluate)
