"""Messages to token ids with a loss mask, and what the model wrote back to a message.

    rendered = chat.render([{"role": "user", "content": "Hello"}], tok)
    rendered.ids, rendered.loss_mask                  # equally long
    chat.parse(reply_ids, tok)                        # {"role": "assistant", "content": ...}

Meta's encoder is the model (meta-llama/llama-models, `llama4/chat_format.py`): header, blank line
and each content item are encoded apart, nothing is stripped, and text is never read for control
tokens. `template()` is the same format as a Jinja template for programs that take one.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herdling.errors import InputError
from herdling.inputs import pythonic, tool_calls
from herdling.inputs.special_tokens import (
    END_OF_TEXT,
    EOM,
    EOT,
    HEADER_END,
    HEADER_START,
    OLD_NAMES,
    PYTHON_END,
    PYTHON_START,
)
from herdling.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from herdling.inputs.images import ImageProcessor, Tiles

# How a role is written in the header (`role_str` in Meta's encoder).
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
    "ipython": "ipython",
}
_DEEPEST = 64
_MOST_BITS = 10_000  # Python refuses to read integers of more than 4300 digits

_RULES = {
    "pythonic": (
        "You can call functions. When one is needed, reply with nothing but a list of calls such "
        "as [name(argument=value, other=value), name(argument=value)], with Python literals as "
        "values. Otherwise reply with plain text.\n"
        "Here is a list of functions in JSON format that you can invoke:\n"
    ),
    "json": (
        "You can call functions. When one is needed, reply with nothing but a JSON object such as "
        '{"type": "function", "name": "name", "parameters": {"argument": "value"}}; several are '
        'separated by "; ". Otherwise reply with plain text.\n'
        "Here is a list of functions in JSON format that you can invoke:\n"
    ),
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: list[int]
    loss_mask: list[bool]
    """True where the model is the author: assistant content and the token that ends it."""
    tiles: "list[Tiles]" = field(default_factory=list)
    """The images, in the order of their patch tokens."""


def render(
    messages: Sequence[Mapping[str, Any]],
    tok: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    dialect: str = "pythonic",
    image_tokens: int | None = None,
    processor: "ImageProcessor | None" = None,
) -> Rendered:
    """Encode OpenAI-style messages, begin_of_text first.

    `content` is a string, null, or parts `{"type": "text", "text": ...}` and
    `{"type": "image", "image": PIL image, path or data URI}`; images need `processor`, and
    `image_tokens` overrides its tokens per tile. `tool_calls` of an assistant message hold their
    arguments as an object or as JSON text. An assistant message of `weight` 0 carries no loss. `tools` are described in the system message, which is
    made if there is none, and calls are written in `dialect`, "pythonic" or "json".
    `add_generation_prompt` opens the reply. A message ends with eot; with eom if it carries a tool
    result, calls a tool, or has `"stop_reason": "end_of_message"`.

    Raises InputError naming the message that is malformed.
    """
    preamble = describe_tools(tools, dialect)
    out = _Writer(tok, dialect, processor, image_tokens)
    if preamble and not (messages and _role(messages[0], 0) == "system"):
        out.message({"role": "system", "content": preamble}, 0)
        preamble = ""
    for i, message in enumerate(messages):
        out.message(message, i, preamble if i == 0 else "")
    if add_generation_prompt:
        out.header("assistant")
    return Rendered(out.ids, out.mask, out.tiles)


def check(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """Raise InputError, naming the message, for what `render` would refuse; needs no tokenizer.

    Pictures are not opened: only an image part without an image and a URL are refused here.
    """
    if tools is not None and not (isinstance(tools, list | tuple) and _is_json(tools)):
        raise InputError(f"tools must be a list of JSON objects, nested at most {_DEEPEST} deep")
    describe_tools(tools)
    for i, message in enumerate(messages):
        _role(message, i)
        for part in _parts(message, i):
            image = "" if part["type"] == "text" else image_of(part)
            if image is None:
                raise InputError(
                    f"messages[{i}] has an image part without an image; set its 'image'"
                )
            if isinstance(image, str) and image[:5].lower() != "data:" and "://" in image:
                raise InputError(
                    f"messages[{i}]: image {image[:60]!r} is a URL, which is never fetched; "
                    "download it and name the file"
                )
        _calls(message, i)
        if message.get("weight") not in (None, 0, 1):
            raise InputError(f"messages[{i}].weight is {message['weight']!r}; it must be 0 or 1")


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether a message carries loss: the assistant's do, but for those of OpenAI's `weight` 0."""
    return message.get("role") == "assistant" and message.get("weight") != 0


def image_of(part: Mapping[str, Any]) -> Any:
    """What an image part holds, in either of OpenAI's spellings or ours; None for nothing."""
    image = part.get("image", part.get("image_url"))
    return image.get("url") if isinstance(image, Mapping) else image


def parse(text_or_ids: str | Iterable[int], tok: Tokenizer | None = None) -> dict[str, Any]:
    """The assistant message in a reply, which may start with its header and end with its stop token.

    Content is kept as written; calls at its end, in any dialect that `tool_calls.read` knows, become
    `tool_calls`: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`. Text that
    looks like a call but is none stays content, flagged by `"unparsed_tool_call": True`. A reply
    without calls that ends with eom has `"stop_reason": "end_of_message"`, as `render` takes it.

    Never raises for what the model wrote; raises InputError for ids without `tok`.
    """
    if isinstance(text_or_ids, str):
        text = text_or_ids
    elif tok is None:
        raise InputError("parse was given ids without a tokenizer; pass tok")
    else:
        text = tok.decode(text_or_ids, surrogates=False)
    for name in (PYTHON_START, PYTHON_END):
        text = text.replace(OLD_NAMES[name], name)
    header = f"{HEADER_START}assistant{HEADER_END}"
    if text.startswith(header):
        text = text[len(header) :].removeprefix("\n\n")
    end = next((stop for stop in (EOT, EOM, END_OF_TEXT) if text.endswith(stop)), "")
    reading = tool_calls.read(text.removesuffix(end))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": reading.content,
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in reading.calls
        ],
    }
    if reading.suspect:
        message["unparsed_tool_call"] = True
    if end == EOM and not reading.calls:
        message["stop_reason"] = "end_of_message"
    return message


def describe_tools(tools: Sequence[Mapping[str, Any]] | None, dialect: str = "pythonic") -> str:
    """What the system message says of `tools` (OpenAI's wrapping or bare); empty for none.

    Raises InputError for a tool without a name, ConfigError for an unknown dialect.
    """
    tool_calls.check_dialect(dialect)
    functions = []
    for i, tool in enumerate(tools or []):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise InputError(f"tools[{i}] has no usable name; give {{'name': 'letters_or_digits'}}")
        functions.append(function)
    if not functions:
        return ""
    return _RULES[dialect] + json.dumps(functions, ensure_ascii=False, indent=4)


@functools.cache
def template() -> str:
    """The `chat_template.jinja` of every saved model.

    It gives the ids of `render` except where text joins what `render` keeps apart: a literal
    control token in a message, content that starts with a line end, neighbouring text parts, and
    calls that follow content. Arguments of tool calls must be objects. Each image part becomes
    `<|image|>`, which transformers' processor expands.
    """
    text = Path(__file__).with_name("chat_template.jinja").read_text("utf-8")
    for dialect, rules in _RULES.items():
        text = text.replace(f"@{dialect.upper()}_RULES@", json.dumps(rules))
    return text.removesuffix("\n")


class _Writer:
    """Ids, loss mask and tiles as they grow."""

    def __init__(
        self,
        tok: Tokenizer,
        dialect: str,
        processor: "ImageProcessor | None",
        image_tokens: int | None,
    ) -> None:
        self.tok, self.dialect = tok, dialect
        self.processor, self.image_tokens = processor, image_tokens
        self.ids: list[int] = [tok.bos]
        self.mask: list[bool] = [False]
        self.tiles: list[Tiles] = []

    def add(self, ids: list[int], loss: bool = False) -> None:
        self.ids += ids
        self.mask += [loss] * len(ids)

    def header(self, role: str) -> None:
        tok = self.tok
        start, end = tok.special(HEADER_START), tok.special(HEADER_END)
        self.add([start, *tok.encode(role), end, *tok.encode("\n\n")])

    def message(self, message: Mapping[str, Any], i: int, preamble: str = "") -> None:
        role = _role(message, i)
        loss = is_learnt(message)
        parts = _parts(message, i)
        calls = _calls(message, i)
        self.header(ROLES[role])
        if preamble:
            filled = any(part.get("text") != "" for part in parts)
            self.add(self.tok.encode(preamble + ("\n\n" if filled else "")))
        for part in parts:
            if part["type"] == "text":
                self.add(self.tok.encode(part["text"]), loss)
            else:
                self.image(part, i)
        if calls:
            self.add(self.tok.encode(tool_calls.write(calls, self.dialect)), loss)
        ends_early = role == "assistant" and message.get("stop_reason") == "end_of_message"
        eom = calls or ends_early or ROLES[role] == "ipython"
        self.add([self.tok.eom if eom else self.tok.eot], loss)

    def image(self, part: Mapping[str, Any], i: int) -> None:
        from herdling.inputs import images  # torch and Pillow, for those who send pictures

        if self.processor is None:
            raise InputError(f"messages[{i}] holds an image, but there is no image processor")
        source = part.get("image", part.get("image_url"))
        source = source.get("url") if isinstance(source, Mapping) else source
        if source is None:
            raise InputError(f"messages[{i}] has an image part without an image; set its 'image'")
        try:
            tiles = images.tile(images.open_image(source), self.processor)
        except InputError as problem:
            raise InputError(f"messages[{i}]: {problem}") from problem
        count = self.image_tokens or self.processor.tokens_per_tile
        self.add(images.image_ids(tiles, self.tok, count))
        self.tiles.append(tiles)


def _role(message: Any, i: int) -> str:
    if not isinstance(message, Mapping):
        raise InputError(f"messages[{i}] is {type(message).__name__}; it must be an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"messages[{i}] has role {role!r}; use one of {', '.join(ROLES)}")
    return role


def _parts(message: Mapping[str, Any], i: int) -> list[Mapping[str, Any]]:
    """The content as a list of checked parts."""
    if "content" not in message and message["role"] != "assistant":
        raise InputError(
            f"messages[{i}] has no content; it may be empty or null, but must be there"
        )
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise InputError(
            f"messages[{i}].content is {type(content).__name__}; use a string, null or a list of "
            "parts (a tool's result goes in as text)"
        )
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if kind not in ("image", "image_url"):
            raise InputError(
                f"messages[{i}].content[{j}] must be {{'type': 'text', 'text': ...}} or "
                "{'type': 'image', 'image': ...}"
            )
    return list(content)


def _calls(message: Mapping[str, Any], i: int) -> list[tool_calls.Call]:
    """The tool calls as names and arguments, checked to be JSON."""
    given = message.get("tool_calls")
    if not given:
        return []
    if message["role"] != "assistant" or not isinstance(given, list | tuple):
        raise InputError(f"messages[{i}].tool_calls must be a list, in an assistant message")
    calls = []
    for j, call in enumerate(given):
        where = f"messages[{i}].tool_calls[{j}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise InputError(f"{where} has no usable function name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as problem:
                raise InputError(f"{where}: arguments are not JSON: {problem}") from None
        if not isinstance(arguments, dict) or not _is_json(arguments):
            raise InputError(f"{where}: arguments must be a JSON object (or its text)")
        calls.append((function["name"], arguments))
    return calls


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and pythonic.NAME.fullmatch(name) is not None


def _is_json(value: Any, depth: int = 0) -> bool:
    """Whether JSON can hold the value exactly, at a depth that can be read back."""
    if depth > _DEEPEST:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(v, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(item, depth + 1) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() < _MOST_BITS
    return value is None or isinstance(value, str)
