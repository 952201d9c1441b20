"""Tells content from tool calls while a reply grows.

    splitter = CallSplitter()
    splitter.push("Let me look. [weather(ci")   # "Let me look. "
    splitter.push('ty="Oslo")]')                # ""
    splitter.end()                              # ("", [("weather", {"city": "Oslo"})])

Text goes out at once unless a call may begin in it; then it waits until it cannot be one, or for the
end. What counts as a call is decided by `herdling.inputs.tool_calls.read` alone, on the whole reply.
"""

import re

from herdling.inputs import pythonic, tool_calls
from herdling.inputs.special_tokens import OLD_NAMES, PYTHON_END, PYTHON_START

_OPENERS = re.compile(r"[\[{<]")
_TAGS = ("<function=", PYTHON_START, OLD_NAMES[PYTHON_START])
_KEYS = ('"type"', '"name"', '"function"', '"id"', '"parameters"', '"arguments"')
_NAME = re.compile(r"[\w.:/-]+\s*")
_ARGUMENT = re.compile(r"[^\s=,()\[\]{}\"'*]+\s*")


class CallSplitter:
    """One reply."""

    def __init__(self) -> None:
        self._sent: list[str] = []
        self._held = ""
        self._tried = 0  # length of what is held when it was last read as calls

    def push(self, text: str) -> str:
        """The part of what has come so far, and has not gone out, that is content for certain."""
        self._held += text
        out: list[str] = []
        while self._held:
            opener = _OPENERS.search(self._held)
            if opener is None:
                out.append(self._take(len(self._held)))
            elif opener.start():
                out.append(self._take(opener.start()))
            elif may_begin_call(self._held) and not self._surpassed():
                break
            else:
                out.append(self._take(1))
        self._sent += out
        return "".join(out)

    def end(self) -> tuple[str, list[tool_calls.Call]]:
        """The rest of the content, and the calls, once the reply has ended."""
        whole = "".join(self._sent) + self._held
        for name in (PYTHON_START, PYTHON_END):
            whole = whole.replace(OLD_NAMES[name], name)
        reading = tool_calls.read(whole)
        if reading.calls:
            # The calls reach to the end, so whatever of them was taken for content is gone already:
            # only what is held can be a call.
            content = reading.content[len("".join(self._sent)) :]
            return content, reading.calls
        return self._held, []

    def _take(self, count: int) -> str:
        taken, self._held, self._tried = self._held[:count], self._held[count:], 0
        return taken

    def _surpassed(self) -> bool:
        """Whether a complete list of calls is followed by more text, so that it is content.

        Tried each time that twice as much is held, which keeps the whole linear.
        """
        if not self._held.startswith("[") or len(self._held) < 2 * self._tried:
            return False
        self._tried = len(self._held)
        found = pythonic.read(self._held, 0)
        return found is not None and bool(self._held[found[1] :].strip())


def may_begin_call(text: str) -> bool:
    """Whether `text`, which starts with an opening character, could go on as a call."""
    if text[0] == "<":
        return any(tag.startswith(text[: len(tag)]) for tag in _TAGS)
    inner = text[1:].lstrip()
    if text[0] == "[" and not inner.startswith("{"):
        return _may_begin_list(inner)
    if text[0] == "[":
        inner = inner[1:].lstrip()
    return any(_fits(inner, key) for key in _KEYS)


def _may_begin_list(inner: str) -> bool:
    """For text after `[`: a name, `(`, and then `)`, `**` or `argument=`."""
    if not inner:
        return True
    name = _NAME.match(inner)
    if name is None:
        return False
    rest = inner[name.end() :]
    if not rest:
        return True
    if rest[0] != "(":
        return False
    rest = rest[1:].lstrip()
    if not rest or rest[0] in ")*":
        return True
    argument = _ARGUMENT.match(rest)
    return argument is not None and rest[argument.end() :][:1] in ("", "=")


def _fits(text: str, key: str) -> bool:
    """Whether `text` begins, or could go on as, `key :`."""
    if len(text) <= len(key):
        return key.startswith(text)
    return text.startswith(key) and text[len(key) :].lstrip()[:1] in ("", ":")
