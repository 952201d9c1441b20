"""The dashboard: what the server says, once a second, only while it is looked at."""

import re

import pytest

pytestmark = pytest.mark.page


def test_it_shows_load_cache_and_experts(page, server):
    page.click("#open-dashboard")
    page.wait_for_selector("#experts li")
    assert "tiny · 5.3 M parameters · 8 layers, 4 with 8 experts" in page.inner_text("#about-model")
    names = page.locator(".card h3").all_inner_texts()
    assert names == [
        "Writing", "Reading", "Requests", "Queue", "Cache", "Memory", "Since the start",
    ]  # fmt: skip
    assert re.search(r"\d+ of 512 pages in use", page.get_attribute(".divided", "aria-label") or "")
    page.click("label:has(#always)")
    assert page.locator("#experts .name").all_inner_texts() == [f"Layer {n}" for n in (1, 3, 5, 7)]
    bars = page.locator("#experts li").first.locator("rect")
    assert bars.count() == 8
    assert "Layer 1: the busiest is expert" in (
        page.locator("#experts svg").first.get_attribute("aria-label") or ""
    )


def test_it_asks_once_a_second_and_only_while_it_is_open(page, server):
    page.click("#open-dashboard")
    page.wait_for_timeout(1200)
    before = server.polls
    page.wait_for_timeout(3000)
    assert 2 <= server.polls - before <= 4
    page.click("#close-dashboard")
    page.wait_for_timeout(500)
    before = server.polls
    page.wait_for_timeout(3000)
    assert server.polls - before <= 1


def test_the_last_minute_is_what_came_since(page):
    page.click("#open-dashboard")
    page.wait_for_timeout(2500)
    label = "document.querySelector('#experts svg').getAttribute('aria-label')"
    recent = page.evaluate(label)
    page.click("label:has(#always)")
    since = page.evaluate(label)
    assert re.fullmatch(r"Layer 1: the busiest is expert \d with \d+ %(; \d unused)?", recent)
    share = int(re.search(r"with (\d+) %", since)[1])
    assert 100 / 8 <= share < 100


def test_it_can_be_linked_to_and_left(page, server, open_page):
    page = open_page(server.url + "#/dashboard")
    page.wait_for_selector("#cards .card")
    assert page.title() == "Dashboard · Herdling"
    page.keyboard.press("d")
    page.wait_for_selector("#text:focus")
    assert page.title() == "Herdling"
