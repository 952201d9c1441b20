"""Whatever a body holds, the answer is 200 or says what is wrong: tests/serve/test_hostile.py"""

import json
import math

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herdling.serve.openai_chat import ChatBody
from herdling.serve.openai_completions import CompletionBody

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 0.5, 1e308, math.inf, -math.inf, math.nan, 2**31, 2**63, -(2**63), 10**400]
)
WORDS = st.sampled_from(
    [
        "",
        "a",
        "auto",
        "required",
        "json_object",
        "json_schema",
        "regex",
        "\ud800",
        "\0",
        "user",
        "https://x/",
        "data:,",
    ]
)
KEYS = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "name",
        "function",
        "parameters",
        "image_url",
        "url",
        "image",
        "tool_calls",
        "arguments",
        "json_schema",
        "schema",
        "regex",
        "experts",
        "include_usage",
        "5",
        "-1",
        "\u0661",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "model", "base"),
    [
        ("/v1/chat/completions", ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", CompletionBody, {"prompt": "a"}),
    ],
)
def test_no_value_of_any_field_breaks_the_server(make_service, engine, ask, path, model, base):
    service = make_service(engine)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from([*model.model_fields]), VALUES, min_size=1, max_size=3))
    def attack(fields):

        content = json.dumps({**base, "max_tokens": 2, **fields}).encode()
        reply: httpx.Response = ask(
            service, "POST", path, content=content, headers={"content-type": "application/json"}
        )
        assert reply.status_code in (200, 400, 404), (fields, reply.text)
        if reply.status_code != 200:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        assert service.worker.failure is None

    attack()
    assert ask(service, "POST", path, json=base).status_code == 200
