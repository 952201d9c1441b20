"""What a model, a file name or an imported file says stays text, and asks no one for anything."""

import json

import pytest

pytestmark = pytest.mark.page

EVIL = '"><img src=x onerror=window.hacked=1>'


def dangerous(page) -> int:
    """Elements that hostile text tried to make."""
    return page.locator(
        "#thread :is(script, iframe, svg[onload], [onerror], [onmouseover])"
    ).count()


def test_hostile_replies_are_text(page, say):
    reply = say(page, "hostile")
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert dangerous(page) == 0
    assert "<script>window.hacked=1</script>" in reply.locator(".body").inner_text()
    addresses = reply.locator("a").evaluate_all("nodes => nodes.map((node) => node.protocol)")
    assert set(addresses) <= {"http:", "https:"}
    assert reply.locator(".inert").all_inner_texts() == ["click", "data"]
    assert reply.locator(".picture").count() == 1
    assert reply.locator("figcaption span").first.inner_text().startswith('html">')
    for name in ("Tokens", "Experts"):
        reply.get_by_role("button", name=name, exact=True).click()
    assert page.evaluate("window.hacked") is None


def test_hostile_messages_titles_and_file_names_are_text(page, say):
    buffer = bytes.fromhex(
        "47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b"
    )
    page.set_input_files(
        "#file", {"name": f"{EVIL}.gif", "mimeType": "image/gif", "buffer": buffer}
    )
    page.wait_for_selector("#attached li")
    assert page.locator("#attached .name").inner_text() == f"{EVIL}.gif"
    say(page, EVIL)
    assert page.locator(".user .plain").inner_text() == EVIL
    assert page.locator("#conversations .open").inner_text() == EVIL
    page.get_by_role("button", name="Show").first.click()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert dangerous(page) == 0


def imported(messages: list) -> str:
    conversation = {"id": "evil", "title": EVIL, "messages": messages, "settings": {"top_p": "x"}}
    return json.dumps(
        {"format": "herdling-conversations", "version": 1, "conversations": [conversation]}
    )


def give(page, text: str) -> None:
    file = {"name": "file.json", "mimeType": "application/json", "buffer": text.encode()}
    page.set_input_files("#import-file", file)


def test_an_imported_file_can_neither_break_the_page_nor_reach_out(page, say):
    pictures = [{"url": "http://evil.invalid/x.png"}, {"url": "data:image/svg+xml;base64,AAAA"}]
    tokens = [{"text": EVIL, "logprob": -1, "top": [[EVIL, "x"], "y"], "experts": [[EVIL, 3]]}]
    messages = [
        {"role": "user", "text": "hi", "images": pictures},
        {"role": "assistant", "text": EVIL, "tokens": tokens, "calls": [{"name": EVIL}]},
        {"role": "user", "text": 7, "state": "writing"},
    ]
    give(page, imported(messages))
    page.wait_for_selector("text=1 conversation was added.")
    page.click("#conversations .open")
    assert page.locator(".message").count() == 3
    assert page.locator("#thread img").count() == 0
    page.get_by_role("button", name="Tokens", exact=True).click()
    page.locator(".token").hover()
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    say(page, "and on")


@pytest.mark.parametrize("text", ["", "{}", "[1]", imported([{"role": "root"}]), '{"a":'])
def test_other_files_are_refused_in_words(page, text):
    give(page, text)
    page.wait_for_selector("text=file.json was not imported:")
    assert page.locator("#conversations li").count() == 0
