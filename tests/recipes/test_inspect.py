"""`herdling inspect`: the text under the loss is marked, or coloured on a terminal; shares add up."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from herdling.cli import main
from herdling.inputs import chat
from herdling.inputs.tokenizer import Tokenizer
from herdling.recipes import inspect

TOK = Tokenizer.train(["user assistant what is the number"], 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOK.save(tmp_path / "tok")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"conversations": turns * 2, "split": "train"}) + "\n"
    )
    return tmp_path


def test_what_is_learned_is_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "shares.json"
    assert main(["inspect", "--data", f"{folder}/a.jsonl,calculator:3", "--tokenizer", str(folder / "tok"),
                   "--split", "train", "--count", "6", "--measure", "40", "--length", "600", "--json", str(out)]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert (
        "<|header_end|>\n\nhi<|eot|><|header_start|>assistant<|header_end|>\n\n[+yo<|eot|>+]"
        in printed
    )
    assert '\n\n[+[calc(x="' in printed
    assert printed.count("[+") == 2 * printed.count("--- ")
    shares = json.loads(out.read_text())
    assert 0 < shares["fill"] <= 1
    mine, sums = shares["sources"].values()
    assert mine["examples"] + sums["examples"] == 40
    assert (mine["weight"], sums["weight"]) == (0.25, 0.75)
    assert abs(mine["tokens"] / (mine["tokens"] + sums["tokens"]) - 0.25) < 0.05
    assert mine["learned"] == mine["examples"] * 2 * len([*TOK.encode("yo"), TOK.eot])
    assert "rows of 600 tokens would be" in printed


def test_rows_are_those_of_the_loader(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question of many rows and a picture that no row holds are in none."""
    record = {"prompt": "the number " * 50, "completion": "yo", "split": "train"}
    (folder / "b.jsonl").write_text(json.dumps(record) + "\n")
    size = len(chat.render([{"role": "user", "content": record["prompt"]}], TOK).ids) + 3
    rest = size % 64
    assert rest > 4
    base = ["inspect", "--tokenizer", str(folder / "tok"), "--count", "0", "--measure", "1"]
    assert main([*base, "--data", f"{folder}/b.jsonl", "--length", "64"]) == 0
    assert f"rows of 64 tokens would be {rest / 64:.1%} full" in capsys.readouterr().out
    assert main([*base, "--data", "count_shapes", "--preset", "nano", "--length", "9"]) == 0
    assert "rows of 9 tokens would be 0.0% full" in capsys.readouterr().out


def test_pictures_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--data", "count_shapes", "--tokenizer", str(folder / "tok"), "--preset", "nano",
                 "--count", "1", "--measure", "5", "--form", "document"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "<|patch|> x " in printed
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("count_shapes  ")]
    assert row[3] == row[7] == "5"  # examples, tiles
    assert main(["inspect", "--data", "count_shapes", "--tokenizer", str(folder / "tok")]) == 2
    assert "the model has no vision" in capsys.readouterr().err


def test_colours_on_a_terminal() -> None:
    rendered = chat.render(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        TOK,
        None,
        False,
    )
    terminal = Console(force_terminal=True, no_color=False, color_system="standard")
    text = inspect.shown(TOK, rendered.ids, rendered.loss_mask, 1000, terminal)
    assert text.plain == TOK.decode(rendered.ids)
    assert [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)] == [
        "yo<|eot|>"
    ]
    cut = inspect.shown(TOK, rendered.ids, rendered.loss_mask, 10, terminal)
    assert cut.plain == TOK.decode(rendered.ids)[:10] + " ..."


def test_no_escape_sequence_of_the_data_reaches_a_terminal() -> None:
    rendered = chat.render(
        [{"role": "assistant", "content": "a\x1b]0;b\x07\n\u009bc"}], TOK, None, False
    )
    console = Console(force_terminal=True, no_color=True)
    text = inspect.shown(TOK, rendered.ids, rendered.loss_mask, 200, console).plain
    assert "a\ufffd]0;b\ufffd\n\ufffdc" in text
    piped = inspect.shown(TOK, rendered.ids, rendered.loss_mask, 200, Console(force_terminal=False))
    assert "a\x1b]0;" in piped.plain


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["inspect", "--tokenizer", str(folder / "tok"), "--data"]
    for rest, message in (
        ([f"{folder}/none.jsonl"], "none.jsonl': no such file"),
        (["calculator", "--measure", "0"], "measure is 0; it must be at least 1"),
        (["calculator", "--split", "all"], "split is 'all'"),
    ):
        assert main([*base, *rest]) != 0
        assert message in capsys.readouterr().err
    assert main([*base, "calculator", "--json", str(folder)]) == 2
    assert "a folder; remedy: the name of a file" in capsys.readouterr().err
    (folder / "a.jsonl").write_text('{"conversations": [{"from": "x"}]}\n')
    assert main([*base, f"{folder}/a.jsonl"]) == 1
    assert f"{folder}/a.jsonl:1: conversations[0] is from 'x'" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "half.jsonl").write_text('{"text": "a\\ud800b"}\n')
    args = ["--tokenizer", str(folder / "tok"), "--data", f"{folder}/half.jsonl", "--split", "all"]
    assert main(["inspect", *args, "--count", "1", "--measure", "1"]) == 0
    shown = capsys.readouterr().out
    assert "\ufffd" in shown
    shown.encode("utf-8")
