"""The terminal chat: one shot, session, commands, Ctrl-C, and errors of one line."""

import builtins
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import herdling
from herdling.cli import main
from herdling.config import parse
from herdling.errors import InputError
from herdling.guard.policy import Policy
from herdling.guard.taxonomy import Verdict
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build, decoder_of
from herdling.recipes import chat


def toy(vision: bool = True) -> LM:
    tok = Tokenizer.train(["what do you see in the picture? " * 4], 320)
    config = preset("nano", vision=vision, vocab_size=len(tok))
    if vision:
        config = replace(config, image_token_index=tok.patch)
    model = initialize(build(config), std=0.1).eval()
    with torch.no_grad():  # logits of 0: greedy replies hold no control token
        decoder_of(model).lm_head.weight[list(tok.specials.values())] = 0
    return LM(model, tok)


@pytest.fixture(scope="module")
def lm() -> LM:
    return toy()


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("chat") / "model"
    herdling.save(lm, path)
    return str(path)


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def type_lines(monkeypatch) -> Callable[..., None]:
    """type_lines("text", KeyboardInterrupt, ...): what input() gives, then end of file."""

    def script(*lines) -> None:
        rest = iter([*lines, EOFError])

        def answer(prompt: str = "") -> str:
            line = next(rest)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", answer)

    return script


def config_of(*args: str) -> chat.Config:
    return parse(chat.Config, args, prog="herdling chat")


SHORT = ["--max-tokens", "6", "--temperature", "0"]


def test_one_shot_prints_only_the_reply(lm, folder, capsys):
    assert main(["chat", folder, "-p", "what?", *SHORT]) == 0
    captured = capsys.readouterr()
    want = lm.chat([{"role": "user", "content": "what?"}], max_tokens=6, temperature=0.0)
    assert captured.out == want["content"] + "\n"
    assert captured.err == "[cut short: no room for more, see --max-tokens]\n"


def test_one_shot_with_system_image_and_seed(lm, folder, picture, capsys):
    args = ["--image", str(picture), "--image", str(picture), "--system", "be brief"]
    assert main(["chat", folder, "-p", "what?", *args, "--max-tokens", "6", "--seed", "5"]) == 0
    parts = [{"type": "image", "image": picture}] * 2 + [{"type": "text", "text": "what?"}]
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": parts},
    ]
    want = lm.chat(messages, max_tokens=6, seed=5)
    assert capsys.readouterr().out == want["content"] + "\n"


def test_a_session_remembers_and_resets(lm, folder, type_lines, capsys):
    type_lines("what?", "and then?", "/reset", "what?")
    assert main(["chat", folder, *SHORT]) == 0
    first = {"role": "user", "content": "what?"}
    one = lm.chat([first], max_tokens=6, temperature=0.0)["content"]
    history = [first, {"role": "assistant", "content": one}]
    second = {"role": "user", "content": "and then?"}
    two = lm.chat([*history, second], max_tokens=6, temperature=0.0)["content"]
    assert capsys.readouterr().out == f"{one}\n{two}\n{one}\n\n"


def test_commands(lm, folder, picture, type_lines, capsys):
    lines = [f"/image '{picture}'", "what?", "/help", "/image", "/nonsense", "  ", "", "/quit", "x"]
    type_lines(*lines)
    assert main(["chat", folder, *SHORT]) == 0
    out = capsys.readouterr().out
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    want = lm.chat([{"role": "user", "content": parts}], max_tokens=6, temperature=0.0)["content"]
    assert out.startswith(want + "\n")
    assert chat.HELP in out
    assert "/image needs a file; /help lists" in out
    assert out.endswith("/nonsense is not a command; /help lists them (a space before it sends it as text)\n")  # fmt: skip


def test_an_error_leaves_the_session_as_it_was(lm, folder, type_lines, capsys):
    type_lines("/image absent.png", "what? " * 20_000, "what?")
    assert main(["chat", folder, *SHORT]) == 0
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert errors[0] == "error: image 'absent.png' is not a file"
    assert "max_position_embeddings, 16384" in errors[1]
    want = lm.chat([{"role": "user", "content": "what?"}], max_tokens=6, temperature=0.0)
    assert captured.out == want["content"] + "\n\n"


def test_errors_of_one_shot_are_one_line(folder, tmp_path, capsys):
    for args, status, words in (
        ([folder, "-p", "x", "--image", "absent.png"], 1, "absent.png"),
        ([str(tmp_path / "none"), "-p", "x"], 1, "no such folder"),
        ([folder, "-p", "x", "--temperature", "-1"], 2, "temperature is -1"),
        ([folder, "-p", "x", "--seed", "-1"], 2, "seed is -1"),
        ([folder, "-p", "x", "--max-tokens", "0"], 2, "max_tokens is 0"),
        ([folder, "-p", "x", "--dtype", "int3"], 2, "dtype is 'int3'"),
    ):
        assert main(["chat", *args]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("herdling: error: ")
        assert captured.err.count("\n") == 1
        assert words in captured.err


def test_a_text_model_refuses_pictures(picture):
    session = chat.Session(toy(vision=False), config_of("anywhere"))
    with pytest.raises(InputError, match="this model is text-only"):
        session.show(picture)


def test_ctrl_c_keeps_what_was_said(lm):
    session = chat.Session(lm, config_of("anywhere", "--max-tokens", "50", "--temperature", "0"))
    said = []

    def say(piece: str) -> None:
        said.append(piece)
        if len(said) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session.reply("what?", say)
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"] == "".join(said)
    assert session.reply("and?", lambda piece: None) is False
    assert len(session.messages) == 4


def test_ctrl_c_before_the_first_word_takes_the_turn_back(lm, picture, monkeypatch):
    session = chat.Session(lm, config_of("anywhere", "--image", str(picture)))
    session.show(picture)

    def interrupted(requests):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(lm.engine, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.reply("what?", print)
    assert session.messages == []
    assert len(session.waiting) == 1


def test_ctrl_c_in_a_session_stops_the_reply_only(lm, folder, type_lines, capsys, monkeypatch):
    def stopping(piece: str) -> None:
        print(piece, end="")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "_print", stopping)
    type_lines("what?", KeyboardInterrupt, "/help")
    assert main(["chat", folder, *SHORT]) == 0
    out = capsys.readouterr().out
    assert " [stopped]\n\n" in out
    assert out.endswith(chat.HELP + "\n\n")


def test_escape_sequences_do_not_reach_a_terminal(capsys, monkeypatch):
    chat._print("a\x1b]0;title\x07\tb\n\x9b")
    assert capsys.readouterr().out == "a\x1b]0;title\x07\tb\n\x9b"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    chat._print("a\x1b]0;title\x07\tb\n\x9b")
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffd\tb\n\ufffd"


def test_ctrl_c_and_ctrl_d_in_a_real_terminal(folder):
    """A pseudo-terminal: a long reply is stopped by Ctrl-C, the session answers on, Ctrl-D ends it."""
    shell, terminal = pty.openpty()
    # The terminal has to become the controlling one of the new session, or Ctrl-C sends no signal.
    code = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    code += "from herdling.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "chat", folder]
    process = subprocess.Popen(
        [*command, "--max-tokens", "9000", "--temperature", "0"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(terminal)
    try:
        screen = _read_until(shell, b"> ")
        assert b"Ctrl-D ends the session" in screen
        os.write(shell, b"what?\n")
        _read_until(shell, b"what?\r\n")
        assert len(_read_until(shell, b"", 20)) >= 20
        os.write(shell, b"\x03")
        _read_until(shell, b" [stopped]\r\n> ")
        os.write(shell, b"/help\n")
        _read_until(shell, b"stop the reply\r\n> ")
        os.write(shell, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(shell)


def _read_until(shell: int, words: bytes, least: int = 1, seconds: float = 90) -> bytes:
    """What appears on the terminal until `words` do, and at least so many bytes."""
    screen, end = b"", time.monotonic() + seconds
    while words not in screen or len(screen) < least:
        left = end - time.monotonic()
        assert left > 0, f"{words!r} did not appear; the terminal shows {screen!r}"
        if select.select([shell], [], [], left)[0]:
            screen += os.read(shell, 4096)
    return screen


class Objector:
    """Objects to messages that hold its word."""

    name = "objector"

    def __init__(self, word: str) -> None:
        self.word = word

    def judge(self, messages):
        found = ("S1",) if self.word in messages[-1]["content"] else ()
        return Verdict(found, float(bool(found)), self.name)


def test_safeguards_stop_a_message_and_leave_the_session_as_it_was(lm, capsys):
    session = chat.Session(lm, config_of("x", *SHORT), Objector("evil"))
    said = []
    with pytest.raises(InputError, match="stopped by the safeguards"):
        session.reply("an evil word", said.append)
    assert (said, session.messages) == ([], [])
    assert "objector objects to your message: S1 Violent Crimes" in capsys.readouterr().err
    session = chat.Session(lm, config_of("x", *SHORT), Objector("evil"), Policy({"S1": "replace"}))
    assert session.reply("an evil word", said.append)
    assert said == [Policy().message]


def test_safeguards_cut_a_reply(lm, capsys):
    config = config_of("x", "--max-tokens", "60", "--temperature", "0")
    plain = []
    chat.Session(lm, config).reply("what?", plain.append)
    text = "".join(plain)
    word = text[30:36]
    said = []
    session = chat.Session(lm, config, Objector(word), Policy(window=10))
    session.reply("what?", said.append)
    shown, ending = "".join(said[:-1]), said[-1]
    assert ending == "[stopped by the safeguards]"
    assert text.startswith(shown)
    assert word not in shown
    assert len(shown) <= text.index(word) + len(word)
    logged = []
    capsys.readouterr()
    session = chat.Session(lm, config, Objector(word), Policy({"default": "log"}, window=10))
    session.reply("what?", logged.append)
    assert "".join(logged) == text
    assert capsys.readouterr().err.count("objects to the reply: S1") == 1


def test_a_policy_without_a_guard_is_an_error(folder, tmp_path, capsys):
    assert main(["chat", folder, "-p", "x", "--guard-policy", str(tmp_path / "p.yaml")]) == 2
    assert "nothing judges" in capsys.readouterr().err
