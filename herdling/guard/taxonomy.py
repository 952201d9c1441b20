"""What may be unsafe: MLCommons' hazards under the numbers that Llama Guard 4 gives them, and attacks.

Sources: MLCommons AILuminate (arXiv 2503.05731); meta-llama/PurpleLlama `Llama-Guard4/12B/MODEL_CARD.md`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from herdling.config import nearest
from herdling.errors import ConfigError

HAZARDS = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex-Related Crimes",
    "S4": "Child Sexual Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Suicide & Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "S14": "Code Interpreter Abuse",
}
INJECTION = "P1"
UNREADABLE = "unreadable"
CATEGORIES = {
    **HAZARDS,
    INJECTION: "Prompt Injection",
    UNREADABLE: "The judge's answer is no verdict",
}
"""Every category that a verdict can name."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a message."""

    categories: tuple[str, ...] = ()
    """What it violates, worst first where the judge can tell; empty if it is safe."""
    score: float = 0.0
    """How sure the judge is that it is unsafe, 0 to 1; 0 or 1 where the judge only says which."""
    judge: str = ""
    """Who says so."""

    @property
    def safe(self) -> bool:
        return not self.categories


def both(verdicts: Iterable[Verdict]) -> Verdict:
    """What several judges say together: everything that any of them objects to."""
    given = sorted(verdicts, key=lambda verdict: -verdict.score)
    categories = dict.fromkeys(name for verdict in given for name in verdict.categories)
    against = [verdict.judge for verdict in given if not verdict.safe]
    score = max((verdict.score for verdict in given), default=0.0)
    return Verdict(tuple(categories), score, "+".join(against or [v.judge for v in given]))


def check_category(name: str) -> str:
    """The category as it is written here (s1 is S1). Raises ConfigError for an unknown one."""
    for known in CATEGORIES:
        if name.casefold() == known.casefold():
            return known
    raise ConfigError(f"category {name!r} is unknown{nearest(name, list(CATEGORIES))}")
