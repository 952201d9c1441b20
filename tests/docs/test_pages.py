"""python -m pytest tests/docs/test_pages.py: links lead somewhere, and what the pages name exists.

Commands are checked by name and flag, not run; `docs/log.md` is history and may name what is gone.
"""

import contextlib
import importlib
import io
import json
import re
from functools import cache
from pathlib import Path

import pytest

from herdling import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIVE = [page for page in PAGES if page.name != "log.md"]
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.name)
def test_files_modules_and_make_targets_exist(page: Path) -> None:
    text, targets = page.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for file in re.findall(r"\b((?:herdling|tests|benchmarks|docs)/[\w/.-]+\.\w+)", text):
        assert (ROOT / file).exists(), file
    for name in set(re.findall(r"`(herdling(?:\.[a-z]\w*)+)", text)):
        found = importlib.import_module("herdling")
        for part in name.split(".")[1:]:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)
    for target in re.findall(r"`make (\w+)", text):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target


@cache
def flags(verb: str) -> frozenset[str]:
    parts = ("train", "check", "prune") if verb == "guard" else ("",)
    said = io.StringIO()
    for part in parts:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli.main([verb, *filter(None, [part]), "--help"])
    return frozenset(FLAG.findall(said.getvalue())) | {"--config", "--debug"}


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.name)
def test_commands_have_only_flags_that_exist(page: Path) -> None:
    text = page.read_text("utf-8").replace("\\\n", " ")
    for verb, rest in re.findall(rf"herdling ({'|'.join(cli.VERBS)})\b([^\n`|#]*)", text):
        assert set(FLAG.findall(rest)) <= flags(verb), f"herdling {verb}{rest}"
    for script, rest in re.findall(r"python (benchmarks/\w+\.py)([^\n`|#]*)", text):
        source = (ROOT / script).read_text("utf-8")
        for flag in FLAG.findall(rest):
            name = flag.removeprefix("--").replace("-", "_").split(".")[-1]
            assert flag in source or re.search(rf"^\s+{name}: ", source, re.MULTILINE), flag


@pytest.mark.parametrize("page", LIVE, ids=lambda page: page.name)
def test_json_is_one_value_or_lines_of_them(page: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        try:
            json.loads(block)
        except json.JSONDecodeError:
            for line in block.splitlines():
                json.loads(line)
