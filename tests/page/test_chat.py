"""A conversation: streaming, stopping, going back, and what a reload must not lose."""

import pytest

pytestmark = pytest.mark.page


def test_a_reply_streams_in_and_ends_as_markdown(page, server, say, until):
    server.delay, server.hold = 0.02, 60
    reply = say(page, "the guide, please", wait=False)
    until(page, "document.querySelector('.assistant .body').textContent.length > 40")
    assert reply.get_attribute("aria-busy") == "true"
    early = reply.locator(".body").inner_text()
    server.hold = None
    page.wait_for_selector("body:not(.replying)")
    assert reply.get_attribute("aria-busy") == "false"
    assert len(reply.locator(".body").inner_text()) > len(early)
    body = reply.locator(".body")
    assert body.locator("strong").inner_text() == "young"
    assert body.locator("h4.level2").inner_text() == "Three rules"
    assert body.locator("ol > li").count() == 2
    assert body.locator("ol > li > ul > li").count() == 2
    assert body.locator("tbody tr").count() == 2
    assert body.locator("td").last.inner_text() == "a|b"
    assert body.locator("td").nth(1).get_attribute("class") == "right"
    code = body.locator("figure.code")
    assert "dog" in code.locator(".code-string").inner_text()
    assert code.locator("pre").inner_text().count("\n") == 2
    assert body.locator("a").get_attribute("href") == "https://example.org/herds"
    assert "tokens/s" in reply.locator(".figures").inner_text()


def test_the_request_carries_the_conversation_and_its_settings(page, server, say):
    page.click("#open-settings")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.2")
    page.fill("[name=top_k]", "40")
    page.fill("[name=seed]", "11")
    page.press("[name=seed]", "Tab")
    say(page, "first")
    say(page, "second")
    body = server.bodies[-1]
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == "You said: first"
    assert body["messages"][0]["content"] == "Be brief."
    assert (body["temperature"], body["top_k"], body["seed"]) == (0.2, 40, 11)
    assert body["model"] == "tiny"
    assert body["stream_options"] == {"include_usage": True}
    assert body["logprobs"] is True
    assert body["top_logprobs"] == 5
    assert body["herdling"] == {"experts": True}


def test_what_is_left_out_of_the_settings_is_not_sent(page, server, say):
    page.click("#open-settings")
    page.uncheck("[name=probabilities]")
    page.uncheck("[name=experts]")
    reply = say(page, "plain")
    assert not {"logprobs", "herdling", "seed", "top_k"} & set(server.bodies[-1])
    assert reply.get_by_role("button", name="Tokens").count() == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_has_arrived_and_cancels_on_the_server(page, server, say, how, until):
    server.delay, server.hold = 0.03, 30
    reply = say(page, "count", wait=False)
    until(page, "document.querySelector('.assistant .body').textContent.includes('3')")
    if how == "button":
        page.click("#stop")
    else:
        page.press("#text", "Escape")
    page.wait_for_selector("body:not(.replying)")
    server.hold = None
    text = reply.locator(".body").inner_text()
    assert text.startswith("1 2 3")
    assert "400" not in text
    assert "Stopped." in reply.locator(".note").inner_text()
    until(page, "document.activeElement.id === 'text'")
    for _ in range(40):
        if server.cancelled:
            break
        page.wait_for_timeout(50)
    assert server.cancelled == 1
    reply.get_by_role("button", name="Experts", exact=True).click()  # told while it grew
    assert "Layer 1:" in (reply.locator("canvas").get_attribute("aria-label") or "")


def test_a_reply_that_safeguards_ended_says_so(page, say):
    reply = say(page, "something forbidden")
    assert "safeguards ended the reply" in reply.locator(".note").inner_text()
    assert "You said: something" in reply.locator(".body").inner_text()


def test_regenerate_asks_again_for_the_same_message(page, server, say, until):
    say(page, "hello")
    page.get_by_role("button", name="Regenerate").click()
    until(
        page,
        "document.querySelectorAll('.message').length === 2 && !document.body.classList.contains('replying')",
    )
    assert [m["content"] for m in server.bodies[1]["messages"]] == ["hello"]
    assert page.locator(".message.assistant").count() == 1


def test_editing_replaces_what_came_after_and_can_be_undone(page, server, say, until):
    say(page, "first")
    say(page, "second")
    first = page.locator(".message.user").first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("changed")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('.message').length === 2")
    page.wait_for_selector("body:not(.replying)")
    assert [m["content"] for m in server.bodies[-1]["messages"]] == ["changed"]
    page.locator("#toasts").get_by_role("button", name="Undo").click()
    assert page.locator(".message").count() == 4
    assert page.locator(".message.user").first.locator(".plain").inner_text() == "first"


def test_escape_leaves_a_message_as_it_was(page, say):
    say(page, "keep me")
    page.press("#text", "ArrowUp")
    page.keyboard.type("!!")
    page.keyboard.press("Escape")
    assert page.locator(".message.user .plain").inner_text() == "keep me"
    assert page.locator(".message").count() == 2


def test_a_reload_keeps_conversations_and_settings(page, say):
    page.click("#open-settings")
    page.fill("[name=temperature]", "0.35")
    page.press("[name=temperature]", "Tab")
    say(page, "the guide")
    before = page.locator("#thread").inner_text()
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator("#thread").inner_text() == before
    assert page.locator("#conversations li").count() == 1
    assert page.input_value("[name=temperature]") == "0.35"


def test_a_reload_in_the_middle_of_a_reply_loses_nothing_received(page, server, say, until):
    server.delay, server.hold = 0.02, 90
    reply = say(page, "count", wait=False)
    until(page, "document.querySelector('.assistant .body').textContent.includes('25')")
    seen = reply.locator(".body").inner_text().strip()
    page.reload()
    page.wait_for_selector(".message.assistant")
    kept = page.locator(".assistant .body").inner_text()
    assert kept.startswith(seen)
    assert "interrupted" in page.locator(".assistant .note").inner_text()
    server.delay, server.hold = 0, None
    page.get_by_role("button", name="Try again").click()
    until(page, "document.querySelector('.assistant .body').textContent.endsWith('400')")


def test_a_reply_goes_on_while_another_conversation_is_read(page, server, say, until):
    server.hold = 3
    say(page, "umlaut", wait=False)
    page.click("#new")
    assert page.locator("#conversations li.busy").count() == 1
    assert page.locator(".message").count() == 0
    server.hold = None
    until(page, "!document.querySelector('#conversations li.busy')")
    page.click("#conversations .open")
    assert page.locator(".assistant .body").inner_text() == "Grüße aus Köln: 🦙🦙 und ein €."


def test_tool_calls_are_cards_and_take_a_result(page, server, say):
    page.click("#open-settings")
    page.fill("[name=tools]", '[{"name": "get_weather", "parameters": {"type": "object"}}]')
    page.press("[name=tools]", "Tab")
    reply = say(page, "weather?")
    card = reply.locator("figure.call")
    assert card.locator("figcaption").text_content() == "Calls get_weather"
    assert '"city": "Oslo"' in card.locator("pre").inner_text()
    card.locator("textarea").fill("4 degrees, rain")
    card.get_by_role("button", name="Send result").click()
    page.wait_for_selector("text=The tool says: 4 degrees, rain")
    sent = server.bodies[-1]["messages"]
    assert sent[1]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert sent[2] == {"role": "tool", "content": "4 degrees, rain", "tool_call_id": "call_1"}
    assert server.bodies[-1]["tools"][0]["function"]["name"] == "get_weather"


def test_tools_that_are_not_json_are_said_to_be_so(page, server, say):
    page.click("#open-settings")
    page.fill("[name=tools]", "[{")
    page.press("[name=tools]", "Tab")
    assert "not JSON" in page.locator("#fields [role=alert]").inner_text()
    reply = say(page, "weather?")
    assert "not JSON" in reply.locator(".note").inner_text()
    assert server.bodies == []


def test_the_page_follows_a_long_reply_unless_the_reader_scrolls_up(page, server, say):
    say(page, "long")
    gap = "(({scrollHeight: h, scrollTop: t, clientHeight: c}) => h - t - c)(document.querySelector('#scroller'))"
    assert page.evaluate(gap) < 5
    server.delay, server.hold = 0.003, 800
    say(page, "long again", wait=False)
    page.wait_for_timeout(200)
    page.hover("#thread")
    page.mouse.wheel(0, -600)
    page.wait_for_selector("#to-end:not([hidden])")
    page.wait_for_timeout(300)
    assert page.evaluate(gap) > 200
    page.click("#to-end")
    page.wait_for_timeout(100)
    assert page.evaluate(gap) < 80
    page.click("#stop")
