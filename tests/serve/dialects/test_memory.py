"""Stored conversations: python -m pytest tests/serve/dialects/test_memory.py"""

import pytest

from herdling.serve.dialects.memory import Memory
from herdling.serve.errors import ApiError


def response(id: str) -> dict:
    return {"id": id, "output": []}


def test_the_oldest_go_first():
    memory = Memory(most=2)
    for id in "abc":
        memory.keep(response(id), [{"role": "user", "content": id}])
    assert len(memory) == 2
    with pytest.raises(ApiError) as caught:
        memory.find("a")
    assert caught.value.status == 404
    assert caught.value.code == "previous_response_not_found"
    memory.find("b")
    memory.keep(response("d"), [])
    assert memory.find("b")[1] == [{"role": "user", "content": "b"}]
    with pytest.raises(ApiError):
        memory.find("c")


def test_bytes_are_bounded():
    memory = Memory(most_bytes=1000)
    for id in "abcd":
        memory.keep(response(id), [{"content": "x" * 400}])
    assert len(memory) == 2
    assert memory.nbytes <= 1000
    memory.keep(response("e"), [{"content": "x" * 4000}])
    assert len(memory) == memory.nbytes == 0


def test_the_same_id_counts_once():
    memory = Memory()
    memory.keep(response("a"), [])
    size = memory.nbytes
    memory.keep(response("a"), [])
    assert memory.nbytes == size
    assert memory.forget("a")
    assert not memory.forget("a")
    assert memory.nbytes == 0
