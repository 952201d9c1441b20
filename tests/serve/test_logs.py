"""Log lines: python -m pytest tests/serve/test_logs.py"""

import json
import logging

import pytest

from herdling.serve import logs


@pytest.fixture
def lines(capsys):
    """lines() -> what was logged; the loggers are given back at the end."""
    names = ("herdling", "uvicorn", "uvicorn.error")
    before = [(n, *vars_of(logging.getLogger(n))) for n in names]
    yield lambda: capsys.readouterr().err
    for name, handlers, propagate, level in before:
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def vars_of(logger: logging.Logger):
    return list(logger.handlers), logger.propagate, logger.level


def test_one_json_object_a_line(lines):
    logs.set_up("info", "json")
    logs.access.info("call", extra={"fields": {"id": "a\nb", "seconds": 0.25}})
    logs.access.debug("not this")
    try:
        raise ValueError("odd")
    except ValueError as problem:
        logging.getLogger("herdling.serve").error("it failed", exc_info=problem)
    first, second = map(json.loads, lines().splitlines())
    assert (first["message"], first["id"], first["seconds"]) == ("call", "a\nb", 0.25)
    assert first["time"].endswith("Z")
    assert second["level"] == "error"
    assert "ValueError: odd" in second["trace"]


def test_plain_lines_for_people(lines):
    logs.set_up("warning", "plain")
    logs.access.warning("call", extra={"fields": {"id": "x", "seconds": 0.25, "finish": None}})
    assert lines().endswith("W call id=x seconds=0.250\n")


def test_a_pipe_gets_json(lines):
    logs.set_up()
    logs.access.info("call")
    assert json.loads(lines())["message"] == "call"


def test_notes_belong_to_one_call_and_add_up():
    logs.note(lost=1)
    with logs.call(id="x") as fields:
        logs.note(new_tokens=2, finish="stop")
        logs.note(new_tokens=3, finish="length")
    logs.note(lost=1)
    assert fields == {"id": "x", "new_tokens": 5, "finish": "length"}
