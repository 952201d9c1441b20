"""`langchain-openai`: invoke, stream, tools, structured output, embeddings."""

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Trip(BaseModel):
    """Where to go."""

    city: Literal["Oslo", "Rome"]
    days: Literal[1, 2, 3]


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    return f"rain in {city}"


@pytest.fixture(scope="module")
def make(server):
    def make(**more: Any) -> ChatOpenAI:
        given: Any = {"temperature": 0, "max_retries": 0, **more}
        return ChatOpenAI(model="toy", base_url=f"{server.url}/v1", api_key="none", **given)

    return make


def test_invoke_and_stream(make):
    chat = make(max_tokens=8, stream_usage=True)
    whole = chat.invoke("hello")
    pieces = list(chat.stream("hello"))
    joined = AIMessageChunk(content="")
    for piece in pieces:
        joined += piece
    assert joined.content == whole.content
    assert whole.usage_metadata["output_tokens"] == joined.usage_metadata["output_tokens"] <= 8


def test_a_stream_without_usage(make):
    assert "".join(
        piece.content for piece in make(max_tokens=8, stream_usage=False).stream("hello")
    )


def test_a_tool_loop(make):
    chat = make(max_tokens=300).bind_tools([weather], tool_choice="any")
    said = chat.invoke("hello")
    (call, *_) = said.tool_calls
    assert call["name"] == "weather"
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    free = make(max_tokens=8).bind_tools([weather])
    assert free.invoke([HumanMessage("hello"), said, result]) is not None
    streamed = AIMessageChunk(content="")
    for piece in chat.stream("hello"):
        streamed += piece
    assert streamed.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(make, method):
    made = make(max_tokens=400).with_structured_output(Trip, method=method).invoke("hello")
    assert isinstance(made, Trip)


def test_responses_api(make):
    assert make(max_tokens=8, use_responses_api=True).invoke("hello").content


def test_embeddings(server):
    texts = OpenAIEmbeddings(
        model="toy",
        base_url=f"{server.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,
    )
    assert len(texts.embed_documents(["hello", "more"])) == 2
    assert texts.embed_query("hello")
