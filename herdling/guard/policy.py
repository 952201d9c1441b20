"""What a verdict brings about: for each category nothing, a line in the log, a stop, or other words.

    policy = Policy({"default": "block", "S6": "log"})
    policy.action(verdict)              # the strictest that its categories ask for

As a file for `--guard-policy`:

    actions: {default: block, S6: log, P1: replace}
    message: I cannot help with that.
    window: 200
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from herdling.config import load
from herdling.errors import ConfigError
from herdling.guard.taxonomy import CATEGORIES, Verdict, check_category

Action = Literal["ignore", "log", "replace", "block"]
STRICTER: tuple[Action, ...] = ("ignore", "log", "replace", "block")


@dataclass(frozen=True)
class Policy:
    """How strict to be, and what is said instead."""

    actions: dict[str, Action] = field(default_factory=dict)
    """By category: ignore, log, replace or block; `default` is for those not named (block)."""
    message: str = "I cannot help with that."
    """What `replace` says."""
    window: int = 200
    """Characters of a growing reply between two looks; none is sent before it was looked at."""
    input: bool = True
    """Whether what comes in is judged."""
    output: bool = True
    """Whether replies are judged."""

    def __post_init__(self) -> None:
        known = {n if n == "default" else check_category(n): a for n, a in self.actions.items()}
        for name, action in known.items():
            if action not in STRICTER:
                raise ConfigError(
                    f"action of {name} is {action!r}; it must be one of {', '.join(STRICTER)}"
                )
        if len(known) < len(self.actions):  # S1 and s1
            raise ConfigError("actions names a category twice; remedy: one action for each")
        object.__setattr__(self, "actions", known)
        if self.window < 1:
            raise ConfigError(f"window is {self.window}; it must be at least 1")

    def of(self, category: str) -> Action:
        return self.actions.get(category, self.actions.get("default", "block"))

    def action(self, verdict: Verdict) -> Action:
        """The strictest action among the verdict's categories; `ignore` if it is safe."""
        if verdict.safe:
            return "ignore"
        return STRICTER[max(STRICTER.index(self.of(name)) for name in verdict.categories)]

    def table(self) -> str:
        """What each category brings about, one a line."""
        return "\n".join(f"{n:<10} {self.of(n):<8} {text}" for n, text in CATEGORIES.items())


def read_policy(file: Path | None, guards: Sequence[str]) -> Policy:
    """The policy of a YAML file, or the usual one. Raises ConfigError for a policy without guards."""
    if file is None:
        return Policy()
    if not guards:
        raise ConfigError(f"guard_policy is {file}, but nothing judges; remedy: --guard FOLDER")
    return load(Policy, file)
