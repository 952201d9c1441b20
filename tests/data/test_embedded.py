"""Built-in text: splits that share nothing, the same on every reading, within limits."""

import subprocess
import sys

import pytest

from herdling.data import embedded, multilingual
from herdling.data.split import SPLITS, split_of
from herdling.errors import ConfigError


@pytest.mark.parametrize("domain", embedded.DOMAINS)
def test_splits_share_no_document(domain: str) -> None:
    names = {split: {d.name for d in embedded.documents(domain, split)} for split in SPLITS}
    everything = [d.name for d in embedded.documents(domain)]
    assert len(everything) == len(set(everything))
    assert set().union(*names.values()) == set(everything)
    assert sum(len(found) for found in names.values()) == len(everything)
    assert all(len(found) >= 10 for found in names.values())
    for split, found in names.items():
        assert {split_of(name) for name in found} == {split}


def test_test_prose_is_not_inside_training_code() -> None:
    code = {d.name for d in embedded.documents("code", "train")}
    assert not code & {d.name for d in embedded.documents("english", "test")}
    prose = {d.name: d.text for d in embedded.documents("english")}
    assert "json/decoder.py" in prose
    assert "Simple JSON" in prose["json/decoder.py"]
    assert "import" not in prose["json/decoder.py"].split()


def test_each_domain_is_what_it_says() -> None:
    sizes = {d: sum(len(x.text) for x in embedded.documents(d)) for d in embedded.DOMAINS}
    assert min(sizes.values()) > 1_500_000
    assert not any("_sysconfigdata" in d.name for d in embedded.documents("code"))
    german = {d.name: d.text for d in embedded.documents("multilingual")}
    page = german["multilingual/de/territories/0"]
    assert page.startswith("Deutsch (German)\n")
    everything = "".join(t for name, t in german.items() if name.startswith("multilingual/de/"))
    assert "\nGermany: Deutschland\n" in everything
    assert "\n1 Stunde, 2 Stunden\n" in everything
    assert "\nMontag, 1. Januar 2001\n" in everything


def test_pages_do_not_depend_on_when_they_are_made() -> None:
    assert len(multilingual.languages()) > 150
    fresh = dict(multilingual.pages())
    held = {d.name: d.text for d in embedded.documents("multilingual")}
    assert fresh == held


def test_texts_keep_to_the_limit_and_take_each_domain_alike() -> None:
    limit = 300_001
    texts = list(embedded.texts("train", limit=limit))
    assert texts == list(embedded.texts("train", limit=limit))
    size = sum(len(text.encode()) for text in texts)
    assert limit - 3 <= size <= limit  # a character may straddle the limit
    code = sum(len(t.encode()) for t in embedded.texts("train", limit=100_000, domains=["code"]))
    assert code == pytest.approx(100_000, abs=3)
    held_out = {d.text for domain in embedded.DOMAINS for d in embedded.documents(domain, "test")}
    assert not held_out & set(embedded.texts("train"))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="domain is 'poetry'; built-in text has code, english"):
        embedded.documents("poetry")
    with pytest.raises(ConfigError, match="split is 'dev'; use one of train"):
        embedded.documents("code", "dev")


def test_reading_a_language_alone_leaves_its_calendar_to_others():
    """babel keeps what was loaded first for every later user; ours must not be what it keeps."""
    code = (
        "from herdling.data.multilingual import own_data; from babel import Locale; own_data('sv'); "
        "print(Locale.parse('sv').days['stand-alone']['wide'][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "m\u00e5ndag"
