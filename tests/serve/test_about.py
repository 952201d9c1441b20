"""Models, health, version, metrics, status: python -m pytest tests/serve/test_about.py"""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

import herdling
from herdling.infer.engine import Engine
from herdling.serve.service import Service, Settings

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def service(make_service, engine):
    return make_service(engine, aliases=("default",), adapters=("pirate/v2",))


def test_models_are_listed_with_their_other_names(service, ask):
    reply = ask(service, "GET", "/v1/models").json()
    assert reply["object"] == "list"
    assert [model["id"] for model in reply["data"]] == ["toy", "default", "pirate/v2"]
    for model in reply["data"]:
        assert (model["object"], model["owned_by"]) == ("model", "herdling")
        assert isinstance(model["created"], int)
        assert ask(service, "GET", f"/v1/models/{model['id']}").json() == model
    assert reply["data"][2]["parent"] == "toy"
    missing = ask(service, "GET", "/v1/models/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_model_name_chooses_the_adapter(service, ask, engine):
    for name in ("toy", "default", "pirate/v2"):
        assert ask(service, "POST", CHAT, json={**BODY, "model": name}).json()["model"] == name
    assert [request.adapter for request in engine.requests] == [None, None, "pirate/v2"]


def test_while_loading_everything_else_is_503(ask):
    service = Service(Settings(name="toy"))
    for path in ("/health", "/v1/health"):
        reply = ask(service, "GET", path)
        assert (reply.status_code, reply.json()["status"]) == (503, "loading")
    for path, body in ((CHAT, BODY), ("/v1/completions", {"prompt": "a"})):
        reply = ask(service, "POST", path, json=body)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "loading"
        assert reply.headers["retry-after"]
    assert ask(service, "GET", "/v1/models").status_code == 200
    assert ask(service, "GET", "/metrics").status_code == 200
    assert ask(service, "GET", "/herdling/status").json()["model"] is None


def test_health_tells_why_it_failed(service, ask, engine):
    engine.crash = RuntimeError("out of luck")
    assert ask(service, "POST", CHAT, json=BODY).status_code == 500
    reply = ask(service, "GET", "/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "failed")
    assert "out of luck" in reply.json()["reason"]
    assert ask(service, "POST", CHAT, json=BODY).status_code == 503


def test_going_down_refuses_new_calls(service, ask):
    service.draining = True
    assert ask(service, "GET", "/health").json()["status"] == "stopping"
    reply = ask(service, "POST", CHAT, json=BODY)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")


def test_version(service, ask):
    assert ask(service, "GET", "/version").json() == {"version": herdling.__version__}


def test_metrics_can_be_read_and_count(service, ask, engine):
    ask(service, "POST", CHAT, json=BODY)
    while service.worker.stats is None:
        time.sleep(0.01)  # the counts follow the reply
    ask(service, "POST", CHAT, json={"messages": 1})
    ask(service, "GET", "/any/path/at/all")
    reply = ask(service, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }

    def value(name, **labels):
        return samples[(f"herdling_{name}", *sorted(labels.items()))]

    assert value("up") == 1
    assert value("requests_total", route=CHAT, status="200") == 1
    assert value("requests_total", route=CHAT, status="400") == 1
    assert value("requests_total", route="other", status="404") == 1
    assert value("replies_total", reason="stop") == 1
    assert value("queue_seconds_count") == value("decode_seconds_count") == 1
    assert value("new_tokens_total") == 7
    assert value("cache_pages_used") == 1
    assert value("expert_tokens_total", layer="0", expert="1") == 2


def test_status_has_what_the_page_shows(make_service, ask, lm):
    service = make_service(Engine(lm.model, lm.tokenizer))
    ask(service, "POST", CHAT, json={**BODY, "max_tokens": 4})
    while service.worker.stats is None or service.worker.stats.finished == 0:
        time.sleep(0.01)  # the counts follow the reply
    status = ask(service, "GET", "/herdling/status").json()
    assert status["status"] == "ok"
    assert status["name"] == "toy"
    text = lm.config.text
    assert status["model"]["layers"] == text.num_hidden_layers
    assert status["model"]["experts"] == text.num_local_experts
    assert status["model"]["context"] == 2048
    assert status["model"]["vision"] is True
    assert status["engine"]["finished"] == 1
    assert sum(status["engine"]["expert_load"][0]) > 0
    assert status["queue"]["limit"] == 256
    assert status["memory"]["cache_bytes"] > 0
    assert status["memory"]["resident_bytes"] > 10**7
    assert set(status["rates"]) == {"prompt_tokens_per_second", "new_tokens_per_second"}
