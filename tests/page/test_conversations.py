"""The list of conversations: rename, delete and undo, export and import, room in the storage."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.page


def titles(page) -> list[str]:
    return page.locator("#conversations .open").all_inner_texts()


def test_several_conversations_are_kept_apart(page, say):
    say(page, "about sheep")
    page.click("#new")
    say(page, "about goats")
    assert titles(page) == ["about goats", "about sheep"]
    page.click("text=about sheep")
    assert page.locator(".user .plain").all_inner_texts() == ["about sheep"]
    page.click("#new")
    page.click("#new")
    assert len(titles(page)) == 2


def test_rename_and_delete_with_undo(page, say):
    say(page, "about sheep")
    item = page.locator("#conversations li")
    item.hover()
    item.get_by_role("button", name="Rename").click()
    page.keyboard.type("Wool")
    page.keyboard.press("Enter")
    assert titles(page) == ["Wool"]
    item.hover()
    item.get_by_role("button", name="Delete Wool").click()
    assert titles(page) == []
    assert page.locator(".message").count() == 0
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    assert titles(page) == ["Wool"]
    assert page.locator(".message").count() == 2
    page.reload()
    assert titles(page) == ["Wool"]


def test_export_and_import_bring_everything_back(page, server, open_page, say, tmp_path):
    say(page, "colour")
    page.click("#new")
    say(page, "about goats")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "all.json"
    download.value.save_as(file)
    kept = json.loads(Path(file).read_text())
    assert [c["title"] for c in kept["conversations"]] == ["about goats", "colour"]

    other = open_page(server.url)
    other.set_input_files("#import-file", file)
    other.wait_for_selector("text=2 conversations were added.")
    assert titles(other) == ["about goats", "colour"]
    other.click("#conversations .open >> nth=1")
    other.get_by_role("button", name="Experts", exact=True).click()
    assert other.locator("canvas").count() == 1
    other.set_input_files("#import-file", file)
    other.locator("#conversations li").nth(3).wait_for()
    assert len(titles(other)) == 4


def test_when_the_storage_is_full_details_of_old_conversations_go_first(page, say):
    say(page, "colour")
    page.click("#new")
    page.evaluate(
        "localStorage.setItem('ballast', 'x'.repeat(5 * 2 ** 20 - JSON.stringify(localStorage).length - 9000))"
    )
    say(page, "count")
    sizes = page.evaluate(
        """() => JSON.parse(localStorage.getItem('herdling.list')).map(({id}) =>
            JSON.parse(localStorage.getItem('herdling.chat.' + id)).messages.map((m) => [m.text.length, m.tokens?.length ?? 0]))"""
    )
    (_, old) = sizes
    assert old[1][0] > 0
    assert old[1][1] == 0


def test_two_tabs_see_each_others_conversations(page, server, say):
    other = page.context.new_page()
    other.goto(server.url)
    say(page, "from the first tab")
    other.locator("#conversations li").wait_for()
    assert titles(other) == ["from the first tab"]
