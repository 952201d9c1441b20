"""The OpenAPI document knows our bodies: python -m pytest tests/serve/dialects/test_documented.py"""

from herdling.serve.dialects import documented


def test_bodies_streams_and_errors_are_in_the_document(api):
    paths = api.get("/openapi.json").json()["paths"]
    said = paths["/v1/messages"]["post"]
    schema = said["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["messages", "max_tokens"]
    assert schema["properties"]["max_tokens"] == {"type": "integer"}
    assert schema["properties"]["stream"] == {"type": ["boolean", "null"]}
    assert said["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    errors = said["responses"]["4XX"]["content"]["application/json"]["schema"]
    assert errors["required"] == ["type", "error"]
    assert "application/x-ndjson" in paths["/api/chat"]["post"]["responses"]["200"]["content"]
    assert "content" not in paths["/ping"]["get"]["responses"]["200"]


def test_a_schema_of_its_own_is_kept():
    content = documented.body({"input": {}})["requestBody"]["content"]
    assert content["application/json"]["schema"]["properties"] == {"input": {}}
