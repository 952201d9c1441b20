"""A server that loads, wants a key, refuses, breaks off, goes away and comes back."""

import pytest

pytestmark = pytest.mark.page


def test_gone_and_back(page, server, say):
    say(page, "hello")
    server.stop()
    page.fill("#text", "are you there?")
    page.press("#text", "Enter")
    page.wait_for_selector("#banner.gone:not([hidden])")
    note = page.locator(".assistant .note").last
    assert "does not answer" in note.inner_text()
    server.start()
    page.wait_for_selector("#banner", state="hidden")
    note.get_by_role("button", name="Try again").click()
    page.wait_for_selector("text=You said: are you there?")
    assert page.locator(".message").count() == 4


def test_a_server_that_goes_in_the_middle_leaves_what_it_said(page, server, say, until):
    server.delay, server.hold = 0.03, 40
    reply = say(page, "count", wait=False)
    until(page, "document.querySelector('.assistant .body').textContent.includes('9')")
    server.stop()
    page.wait_for_selector("body:not(.replying)")
    assert reply.locator(".body").inner_text().startswith("1 2 3 4 5 6 7 8 9")
    assert "broke off" in reply.locator(".note").inner_text()
    server.start()


def test_a_connection_that_ends_early_is_an_interruption(page, server, say):
    server.delay = 0.05
    reply = say(page, "break")
    assert reply.locator(".body").inner_text().startswith("You")
    assert "broke off" in reply.locator(".note").inner_text()


def test_the_page_opens_while_the_model_loads(server, open_page, say):
    server.loading = True
    page = open_page(server.url)
    page.wait_for_selector("#banner.loading:not([hidden])")
    server.loading = False
    page.wait_for_selector("#banner", state="hidden")
    say(page, "hello")


def test_a_key_is_asked_for_and_remembered(server, open_page, say):
    server.key = "sesame"
    page = open_page(server.url)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#banner.key:not([hidden])")
    page.click("#banner-key")
    page.fill("#key", "sesame")
    page.check("#key-keep")
    page.click("text=Use this key")
    page.wait_for_selector("#banner", state="hidden")
    say(page, "hello")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("#key-dialog[open]").count() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [("too long", "8192 tokens, but the prompt has 9001"), ("busy", "Try again in 7 s.")],
)
def test_refusals_are_told_in_the_servers_words(page, say, text, said):
    reply = say(page, text)
    assert said in reply.locator(".note").inner_text()
    assert reply.get_by_role("button", name="Try again").count() == 1
