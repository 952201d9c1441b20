"""A reply that is still growing, held back until it has been looked at.

    watch = Watch(policy, messages)
    watch.push("some text")
    if watch.due: verdict = judge.judge(watch.messages())    # as often as the policy's window says
    text = watch.passed()                                    # may be shown from now on

The text since the last look is not shown before the next, so that of what is unsafe at most the words that
looked harmless until then have gone out.
"""

from collections.abc import Sequence
from typing import Any

from herdling.guard.policy import Policy
from herdling.guard.prompt import Message

REACH = 2000
"""Characters before the new ones that are judged along with them."""


class Watch:
    """One reply to `messages`."""

    def __init__(self, policy: Policy, messages: Sequence[Message]) -> None:
        self._policy, self._before = policy, list(messages)
        self._seen, self._new = "", ""

    def push(self, text: str) -> None:
        """The reply goes on with `text`."""
        self._new += text

    @property
    def due(self) -> bool:
        """Whether so much is new that it must be looked at."""
        return len(self._new) >= self._policy.window

    @property
    def waiting(self) -> bool:
        """Whether anything has not been looked at; ask at the end of the reply."""
        return bool(self._new)

    def messages(self) -> list[Any]:
        """The conversation with the reply so far, or the end of it, as its last message."""
        said = self._seen[-REACH:] + self._new
        return [*self._before, {"role": "assistant", "content": said}]

    def passed(self) -> str:
        """What was new may be shown: it is returned, and counts as seen."""
        new, self._new = self._new, ""
        self._seen += new
        return new
