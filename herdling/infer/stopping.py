"""Text as it becomes certain: whole characters only, and never a piece of a stop string."""

from collections.abc import Sequence

from herdling.inputs.tokenizer import StreamDecoder, Tokenizer


class StoppingText:
    """Decodes a reply token by token and ends it before the first stop string.

    Text that could be the beginning of a stop string is held back until it is decided, so stop
    strings are found however tokens cut them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; nothing must be pushed after it."""

    def push(self, token: int) -> str:
        """The text that this token makes certain; may be empty."""
        return self._take(self._decoder.push(token), last=False)

    def flush(self) -> str:
        """End of the reply: what was held back."""
        return self._take(self._decoder.flush(), last=True)

    def _take(self, text: str, last: bool) -> str:
        text, self._held = self._held + text, ""
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if last:
            return text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
