"""Routes, errors, the page and the document: python -m pytest tests/serve/test_app.py"""

import re
from pathlib import Path

import pytest

from herdling.serve import app as apps

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def service(make_service, engine):
    return make_service(engine)


def test_unknown_routes_and_methods(service, ask):
    reply = ask(service, "GET", "/v1/nothing")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "unknown_url")
    reply = ask(service, "DELETE", CHAT)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b"{", JSON, "not valid JSON"),
        (b"", JSON, "body"),
        (b"[]", JSON, "body"),
        (b"null", JSON, "body"),
        (b"[" * 100_000, JSON, "body"),
        (b'{"messages": [], "n": ' + b"9" * 5000 + b"}", JSON, ""),
        (b'\xff\xfe{"messages": []}', JSON, "body"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}], "temperature": NaN}', JSON, "temperature"),
        (b'{"messages": []}', {"content-type": "text/plain"}, "application/json"),
        (b'{"messages": []}', {}, "application/json"),
    ],
)  # fmt: skip
def test_bodies_that_cannot_be_read(service, ask, content, headers, words):
    reply = ask(service, "POST", CHAT, content=content, headers=headers)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def test_half_a_character_pair_is_text_too(service, ask):
    content = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert ask(service, "POST", CHAT, content=content, headers=JSON).status_code == 200


def test_the_document_describes_bodies_and_errors(service, ask):
    document = ask(service, "GET", "/openapi.json").json()
    operation = document["paths"][CHAT]["post"]
    assert "422" not in operation["responses"]
    assert {"200", "4XX", "5XX"} <= set(operation["responses"])
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    body = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    assert body["required"] == ["messages"]
    assert ask(service, "GET", "/docs").status_code == 404


def test_an_api_as_the_page_on_serving_adds_it(make_service, engine, ask, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[-1]
    scope: dict = {"__name__": "example"}
    exec(code, scope)
    monkeypatch.setattr(apps, "ROUTERS", (scope["routes"],))
    service = make_service(engine)
    assert ask(service, "POST", "/ask", json={"text": "hello"}).json() == {"text": "the dog"}
    assert engine.requests[0].max_tokens == 64
    assert ask(service, "POST", "/ask", json={}).json()["error"]["param"] == "text"


def test_the_page_loads_nothing_from_elsewhere(make_service, engine, ask, tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()
    for name, text in (("index.html", "<h1>hi</h1>"), ("parts/a.js", "1"), (".secret", "x")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(apps, "PAGE", tmp_path)
    service = make_service(engine, keys=("k",))
    page = ask(service, "GET", "/")
    assert page.text == "<h1>hi</h1>"
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|unsafe", policy)
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "javascript" in ask(service, "GET", "/parts/a.js").headers["content-type"]
    assert ask(service, "GET", "/.secret").status_code == 401
    assert ask(service, "GET", "/herdling/status").status_code == 401


def test_other_origins_only_where_allowed(make_service, engine, ask):
    asking = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    plain = ask(make_service(engine), "OPTIONS", CHAT, headers=asking)
    assert plain.status_code == 405
    assert "access-control-allow-origin" not in plain.headers
    service = make_service(engine, keys=("k",), origins=("https://app.example",))
    allowed = ask(service, "OPTIONS", CHAT, headers=asking)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    refused = ask(service, "GET", "/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
