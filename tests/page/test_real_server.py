"""The page against `herdling serve` itself, with an untrained model: every field it relies on is there."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import herdling
from herdling.infer.lm import LM
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.config import preset
from herdling.model.init import initialize
from herdling.model.llama import build

pytestmark = pytest.mark.page

PICTURE = bytes.fromhex(
    "47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model with vision, saved as any other."""
    tok = Tokenizer.train(["the quick brown fox jumps over the lazy dog. 1 2 3"] * 4, 330)
    config = preset("nano", vision=True, vocab_size=len(tok), max_position_embeddings=2048)
    config = replace(
        config,
        image_token_index=tok.patch,
        boi_token_index=tok.special("<|image_start|>"),
        eoi_token_index=tok.special("<|image_end|>"),
    )
    path = tmp_path_factory.mktemp("real") / "model"
    herdling.save(LM(initialize(build(config), seed=3, std=0.12).eval(), tok), path)
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Where the server listens, its model loaded."""
    command = [
        sys.executable,
        "-m",
        "herdling",
        "serve",
        str(folder),
        "--port",
        "0",
        "--name",
        "toy",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said, address = [], ""
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            address = found[0] + "/"
        if "ready after" in line:
            yield address
            break
    else:
        pytest.fail("the server did not start:\n" + "".join(said))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_chat_tokens_experts_and_dashboard(address, open_page, say):
    page = open_page(address)
    page.wait_for_selector("#model option[value=toy]", state="attached")
    page.wait_for_selector("#banner", state="hidden")
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "12")
    page.press("[name=max_tokens]", "Tab")
    page.set_input_files("#file", {"name": "p.gif", "mimeType": "image/gif", "buffer": PICTURE})
    page.wait_for_selector("#attached li")
    assert "1 tile" in page.locator("#attached li").inner_text()
    reply = say(page, "What do you see?")
    assert reply.locator(".note .problem").count() == 0, reply.inner_text()
    assert re.search(r"\d+ tokens .* prompt \d+", reply.locator(".figures").inner_text())

    reply.get_by_role("button", name="Tokens", exact=True).click()
    reply.locator(".token").first.hover()
    assert page.locator("#peek .chances > div").count() >= 5
    assert page.locator("#peek .routes > span").count() >= 1
    reply.get_by_role("button", name="Experts", exact=True).click()
    assert reply.locator("canvas").count() == 1

    page.click("#open-dashboard")
    page.wait_for_selector("#cards .card")
    assert "toy" in page.inner_text("#about-model")
    page.wait_for_selector(".card h3:has-text('Memory')")
    page.click("label:has(#always)")
    page.wait_for_selector("#experts .bars rect", state="attached")


def test_its_refusals_are_told(address, open_page, say):
    page = open_page(address)
    page.wait_for_selector("#model option[value=toy]", state="attached")
    reply = say(page, "word " * 2100)
    assert "maximum context length is 2048" in reply.locator(".note").inner_text()
