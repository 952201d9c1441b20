"""For everybody: screen readers (axe), the keyboard alone, narrow screens, both themes."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.page

AXE = Path(os.environ.get("AXE", ".venv/axe/node_modules/axe-core/axe.min.js"))
GUIDE_IMAGE = {
    "name": "dot.gif",
    "mimeType": "image/gif",
    "buffer": bytes.fromhex(
        "47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b"
    ),
}


def violations(page) -> list[str]:
    """Serious and critical findings of axe on the page as it is."""
    assert AXE.is_file(), f"{AXE} is missing: make page installs it, or name axe.min.js in $AXE"
    page.evaluate(AXE.read_text())
    page.wait_for_timeout(250)  # colours that are on their way
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']}: {node['target']} {node['failureSummary']}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(server, open_page, say, theme):
    page = open_page(server.url, color_scheme=theme)
    assert violations(page) == []
    page.set_input_files("#file", GUIDE_IMAGE)
    page.wait_for_selector("#attached li")
    assert violations(page) == []
    reply = say(page, "the guide")
    page.locator(".message.user").hover()
    for name in ("Tokens", "Experts"):
        reply.get_by_role("button", name=name, exact=True).click()
        assert violations(page) == [], name
    page.click("#open-settings")
    assert violations(page) == []
    page.click("#help")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.hover("#conversations li")
    page.click("#conversations li button[aria-label^=Delete]")
    assert violations(page) == []
    page.click("#open-dashboard")
    page.wait_for_selector("#experts li")
    assert violations(page) == []
    server.stop()
    page.wait_for_selector("#banner.gone:not([hidden])")
    assert violations(page) == []
    server.start()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_errors_tools_and_keys(server, open_page, say, theme):
    server.key = "sesame"
    page = open_page(server.url, color_scheme=theme, width=390)
    page.wait_for_selector("#key-dialog[open]")
    assert violations(page) == []
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#banner", state="hidden")
    page.click("#open-settings")
    page.fill("[name=tools]", '{"name": "get_weather"}')
    page.press("[name=tools]", "Tab")
    page.keyboard.press("Escape")
    say(page, "weather?")
    say(page, "too long")
    assert violations(page) == []
    page.click("#menu")
    page.wait_for_timeout(300)
    assert violations(page) == []


@pytest.mark.parametrize("view", ["chat", "tokens", "settings", "list", "dashboard", "help"])
def test_nothing_is_wider_than_a_small_phone(server, open_page, say, view):
    page = open_page(server.url, width=320, height=568, has_touch=True)
    page.set_input_files(
        "#file", [{**GUIDE_IMAGE, "name": f"{'long-name-' * 9}{i}.gif"} for i in range(3)]
    )
    page.locator("#attached li").nth(2).wait_for()
    reply = say(page, "the guide " + "x" * 200)
    if view == "tokens":
        reply.get_by_role("button", name="Experts", exact=True).click()
        reply.locator("summary").click()
        reply.get_by_role("button", name="Tokens", exact=True).click()
    elif view == "settings":
        page.click("#open-settings")
    elif view in ("list", "dashboard"):
        page.click("#menu")
        if view == "dashboard":
            page.click("#open-dashboard")
            page.wait_for_selector("#experts li")
    elif view == "help":
        page.keyboard.press("Tab")
        page.keyboard.press("?")
    page.wait_for_timeout(300)
    wide = page.evaluate(
        """() => [...document.querySelectorAll('html, body, #scroller, #dashboard, #fields, dialog[open]')]
            .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id || node.tagName)"""
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    # What scrolls sideways does so within its own box; everything else ends within the screen.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('#main *, dialog[open] *')].filter((node) => {
            const box = node.getBoundingClientRect();
            return box.width && box.right > 321 && !node.closest('.scroll, pre, #attached, .offscreen');
        }).map((node) => node.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def focused(page) -> str:
    return page.evaluate(
        "(({id, className, tagName}) => id || className || tagName)(document.activeElement)"
    )


def test_a_conversation_with_the_keyboard_alone(page, server, say):
    assert focused(page) == "text"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: one two")
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"

    page.keyboard.press("ArrowUp")  # the last message becomes a field
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=You said: three")

    page.keyboard.press("Tab")  # out of any field, so that single keys work
    page.keyboard.press("k")
    assert focused(page) == "message assistant"
    page.keyboard.press("k")
    assert focused(page) == "message user"
    page.keyboard.press("r")
    page.wait_for_timeout(300)
    assert len(server.bodies) == 3
    assert focused(page) == "text"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("n")
    assert page.locator(".message").count() == 0
    assert focused(page) == "text"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("]")
    page.locator(".message").first.wait_for()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("?")
    assert page.locator("#help-dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#help-dialog[open]").count() == 0
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.keyboard.press(",")
    assert page.locator("#settings.opened").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#settings.opened").count() == 0
    assert focused(page) == "open-settings"
    page.keyboard.press("/")
    assert focused(page) == "text"
    page.keyboard.type("n?")  # letters, not commands, while writing
    assert page.input_value("#text") == "n?"


def test_everything_can_be_reached_with_tab(page, say):
    say(page, "the guide")
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim() || document.activeElement.id"
            )
        )
    assert {
        "New conversation", "Export all", "Import", "Server dashboard", "Model", "Settings", "Copy",
        "Regenerate", "Tokens", "Experts", "Add pictures", "Message", "Edit and send again",
        "Code, python", "Table", "Delete the guide",
    } <= seen | {"Model"}  # fmt: skip


def test_single_keys_can_be_turned_off(page):
    page.click("#help")
    page.uncheck("#single-keys")
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") is None


def test_finished_replies_are_read_out_once_and_politely(page, server, say, until):
    server.hold = 4
    said = "document.querySelector('#announcer').textContent"
    say(page, "umlaut", wait=False)
    page.wait_for_timeout(150)
    assert page.evaluate(said) == ""
    server.hold = None
    until(page, said + ".startsWith('Grüße')")
    assert page.get_attribute("#announcer", "aria-live") == "polite"


def test_the_chosen_theme_is_there_before_the_first_paint(page):
    page.click("#theme")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 21, 19)"
