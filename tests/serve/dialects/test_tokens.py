"""`/tokenize` and its like: python -m pytest tests/serve/dialects/test_tokens.py"""

import pytest

HELLO = [{"role": "user", "content": "hello"}]


def test_a_text_and_back(api, tok):
    reply = api.post("/tokenize", {"prompt": "the dog", "return_token_strs": True}).json()
    assert reply["tokens"] == [tok.bos, *tok.encode("the dog")]
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 2048)
    assert "".join(reply["token_strs"]) == "<|begin_of_text|>the dog"
    bare = api.post("/tokenize", {"prompt": "the dog", "add_special_tokens": False}).json()
    assert bare["tokens"] == tok.encode("the dog")
    assert bare["token_strs"] is None
    assert api.post("/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": "the dog"}


def test_lm_eval_finds_its_tokens(api, tok):
    """It asks for `eos_token` by name, and sends texts to which it applied the template."""
    info = api.get("/tokenizer_info").json()
    for name, id in (
        ("eos_token", tok.end_of_text),
        ("bos_token", tok.bos),
        ("pad_token", tok.pad),
    ):
        body = {"prompt": info[name], "add_special_tokens": False}
        assert api.post("/tokenize", body).json()["tokens"] == [id]
    assert info["tokenizer_class"]
    rendered = api.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    text = api.post("/detokenize", {"tokens": rendered}).json()["prompt"]
    again = api.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert again == rendered


def test_a_users_text_can_be_read_as_such(api, tok):
    body = {"prompt": "<|eot|>", "add_special_tokens": False}
    assert api.post("/tokenize", body).json()["tokens"] == [tok.eot]
    plain = api.post("/tokenize", {**body, "parse_special": False}).json()["tokens"]
    assert plain == tok.encode("<|eot|>")
    assert tok.eot not in plain


def test_a_conversation_as_the_model_reads_it(api, lm):
    ids = api.post("/tokenize", {"messages": HELLO}).json()["tokens"]
    assert ids == lm.render(HELLO).ids
    body = {"messages": HELLO, "add_generation_prompt": False}
    assert api.post("/tokenize", body).json()["tokens"] == ids[: ids.index(lm.tokenizer.eot) + 1]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with_tools = api.post("/tokenize", {"messages": HELLO, "tools": tools}).json()["tokens"]
    assert with_tools == lm.render(HELLO, tools).ids


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": ["a"]}, 400),
        ("/tokenize", {"messages": "a"}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [10**9]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
    ],
)
def test_errors(api, path, body, status):
    reply = api.post(path, body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
