"""Every reply parsed strictly by the clients' own models, in an environment of theirs.

    pip install openai anthropic ollama huggingface_hub
    python tests/clients/sdk_shapes.py http://127.0.0.1:8000 MODEL [KEY]

The SDKs themselves construct their objects without checking them, so each is validated again here. Works
with any model: calls are forced by `tool_choice`. Exit status 1 if anything does not fit.
"""

import base64
import sys
import traceback
from collections.abc import Callable
from typing import Any

import anthropic
import ollama
import openai
from anthropic.types import Message, RawMessageStreamEvent
from huggingface_hub import InferenceClient
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

URL, MODEL, KEY = [*sys.argv[1:], "none"][:3]
OPENAI = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
OLLAMA = ollama.Client(host=URL, headers={"Authorization": f"Bearer {KEY}"})
HUB = InferenceClient(URL, token=KEY)
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
DATA_URI = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "hello"}]
CHECKS: list[Callable[[], Any]] = []


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS.append(function)
    return function


def fits(kind: Any, made: Any) -> Any:
    """`made`, if its JSON is valid as `kind`."""
    TypeAdapter(kind).validate_python(made.model_dump(by_alias=True, exclude_unset=True))
    return made


def refused(kind: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as problem:
        return str(problem)
    raise AssertionError(f"no {kind.__name__}")


# ---- openai


def respond(**more: Any) -> Any:
    return OPENAI.responses.create(
        **{"model": MODEL, "input": "hello", "max_output_tokens": 8, **more}
    )


TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
FORCED = {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 200}


@check
def responses_whole():
    made = fits(Response, respond(top_logprobs=2, include=["message.output_text.logprobs"]))
    return made.output[0].content[0].logprobs[0]


@check
def responses_stream():
    for more in ({}, FORCED):
        events = [fits(ResponseStreamEvent, event) for event in respond(stream=True, **more)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
    return events[-1].type


@check
def responses_stream_helper():
    with OPENAI.responses.stream(model=MODEL, input="hello", **FORCED) as stream:
        for _ in stream:
            pass
        return stream.get_final_response().output


@check
def responses_tool_loop():
    first = fits(Response, respond(**FORCED))
    call = next(item for item in first.output if item.type == "function_call")
    assert fits(Response, first).output_text is not None
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    said = [item.model_dump(exclude_unset=True) for item in first.output]
    whole = respond(input=[*HELLO, *said, output], tools=[TOOL])
    stored = respond(input=[output], previous_response_id=first.id, tools=[TOOL])
    assert whole.usage.input_tokens == stored.usage.input_tokens
    assert OPENAI.responses.retrieve(stored.id).output_text == stored.output_text
    OPENAI.responses.delete(stored.id)
    return refused(openai.NotFoundError, lambda: OPENAI.responses.retrieve(stored.id))


@check
def responses_parse():
    class City(BaseModel):
        city: bool

    made = OPENAI.responses.parse(
        model=MODEL, input="hello", text_format=City, max_output_tokens=200
    )
    return made.output_parsed


@check
def responses_picture():
    parts = [{"type": "input_image", "image_url": DATA_URI, "detail": "auto"}]
    return respond(input=[{"role": "user", "content": parts}]).usage


@check
def responses_errors():
    hosted = [{"type": "web_search"}]
    return [
        refused(openai.BadRequestError, lambda: respond(tools=hosted)),
        refused(openai.NotFoundError, lambda: respond(model="no such model")),
    ]


@check
def embeddings():
    def embed(**more: Any) -> list[float]:
        return (
            OPENAI.embeddings.create(model=MODEL, input=["a", "the dog"], **more).data[1].embedding
        )

    coded, plain = embed(), embed(encoding_format="float")
    assert max(abs(a - b) for a, b in zip(coded, plain, strict=True)) < 1e-6
    return len(embed(dimensions=4))


# ---- anthropic


def message(**more: Any) -> Any:
    return ANTHROPIC.messages.create(**{"model": MODEL, "max_tokens": 8, "messages": HELLO, **more})


WEATHER = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
ASKED = {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 200}


@check
def messages_whole():
    return fits(Message, message(system="Be brief.", stop_sequences=["never"]))


@check
def messages_stream():
    for more in ({}, ASKED):
        events = [fits(RawMessageStreamEvent, event) for event in message(stream=True, **more)]
    return events[-1].type


@check
def messages_tool_loop():
    with ANTHROPIC.messages.stream(model=MODEL, messages=HELLO, **ASKED) as stream:
        made = fits(Message, stream.get_final_message())
    use = next(block for block in made.content if block.type == "tool_use")
    assert made.stop_reason == "tool_use"
    said = [block.model_dump(exclude_unset=True) for block in made.content]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
    turns = [{"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    return fits(Message, message(messages=[*HELLO, *turns], tools=[WEATHER])).usage


@check
def messages_count():
    count = ANTHROPIC.messages.count_tokens(model=MODEL, messages=HELLO, tools=[WEATHER])
    usage = message(tools=[WEATHER]).usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    return count


@check
def messages_picture_and_errors():
    source = {"type": "base64", "media_type": "image/png", "data": DATA_URI.partition(",")[2]}
    message(messages=[{"role": "user", "content": [{"type": "image", "source": source}]}])
    return [
        refused(anthropic.BadRequestError, lambda: message(messages=[])),
        refused(anthropic.NotFoundError, lambda: message(model="no such model")),
    ]


# ---- ollama


SHORT = {"num_predict": 8}


@check
def ollama_chat():
    whole = OLLAMA.chat(MODEL, HELLO, options=SHORT, logprobs=True, top_logprobs=2)
    assert whole.eval_count == len(whole.logprobs) or whole.done_reason == "stop"
    return [
        piece.message.content for piece in OLLAMA.chat(MODEL, HELLO, options=SHORT, stream=True)
    ]


@check
def ollama_generate():
    first = OLLAMA.generate(MODEL, "hello", options=SHORT)
    more = OLLAMA.generate(MODEL, "more", context=first.context, options=SHORT)
    assert more.prompt_eval_count > first.prompt_eval_count
    OLLAMA.generate(MODEL, "?", images=[PIXEL], options=SHORT)
    return OLLAMA.chat(MODEL, HELLO, format=SCHEMA, options={"num_predict": 200}).message.content


@check
def ollama_models():
    shown = OLLAMA.show(OLLAMA.list().models[0].model)
    return [shown.capabilities, OLLAMA.ps().models[0].context_length]


@check
def ollama_embeddings():
    many = OLLAMA.embed(MODEL, ["a", "b"]).embeddings
    assert OLLAMA.embeddings(MODEL, "a").embedding == many[0]
    return refused(ollama.ResponseError, lambda: OLLAMA.embed("no such model", "a"))


# ---- huggingface_hub


@check
def hub_text():
    def write(**more: Any) -> Any:
        return HUB.text_generation("hello", max_new_tokens=6, **more)

    made = write(details=True, decoder_input_details=True, top_n_tokens=2)
    assert made.details.generated_tokens == len(made.details.tokens)
    assert "".join(write(stream=True)) == write() == made.generated_text
    last = list(write(stream=True, details=True))[-1]
    assert last.generated_text == made.generated_text
    return write(grammar={"type": "regex", "value": "[0-9]{3}"})


def main() -> int:
    failed = 0
    for function in CHECKS:
        try:
            print("ok  ", function.__name__, "|", str(function())[:100].replace("\n", " "))
        except Exception:
            failed += 1
            print("FAIL", function.__name__)
            traceback.print_exc()
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} fit")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
