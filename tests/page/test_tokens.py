"""What can be seen of how a reply came about: probabilities, alternatives, experts."""

import pytest

pytestmark = pytest.mark.page


def point_at(page, selector: str, text: str) -> None:
    """Rests the pointer on the first place where `text` stands within one text node."""
    box = page.evaluate(
        """([selector, text]) => {
            const walker = document.createTreeWalker(document.querySelector(selector), NodeFilter.SHOW_TEXT);
            while (walker.nextNode()) {
                const at = walker.currentNode.data.indexOf(text);
                if (at < 0) continue;
                const range = document.createRange();
                range.setStart(walker.currentNode, at);
                range.setEnd(walker.currentNode, at + text.length);
                range.startContainer.parentElement.scrollIntoView({block: "center"});
                const {x, y, width, height} = range.getBoundingClientRect();
                return [x + width / 2, y + height / 2];
            }
        }""",
        [selector, text],
    )
    page.mouse.move(box[0] - 40, box[1])
    page.mouse.move(*box)


@pytest.mark.parametrize(
    ("word", "token"),
    [("young", "young"), ("guide", "␣guide"), ("code", "code"), ("evening", "g"), ("dog", "dog")],
)
def test_hovering_over_the_text_shows_the_tokens_chances(page, say, word, token):
    say(page, "the guide")
    point_at(page, ".assistant .body", "ng" if word == "evening" else word)
    page.wait_for_selector("#peek:not([hidden])")
    shown = page.locator("#peek .chosen dt").inner_text()
    assert shown == token or token in shown
    assert page.locator("#peek .chances > div").count() == 5
    assert "%" in page.locator("#peek .chosen dd").inner_text()
    assert page.locator("#peek .routes > span").count() == 4
    page.mouse.move(5, 5)
    page.wait_for_selector("#peek", state="hidden")


def test_tokens_that_are_no_characters_alone_are_found(page):
    ranges = page.evaluate(
        """async () => {
            const {tokenRanges} = await import('./reply.js');
            const llama = [...new TextEncoder().encode('🦙')];
            return tokenRanges([{text: 'a'}, {text: '\\ufffd', bytes: llama.slice(0, 2)},
                {text: '\\ufffd', bytes: llama.slice(2)}, {text: 'ü'}]);
        }"""
    )
    assert ranges == [[0, 1], [1, 1], [1, 3], [3, 4]]


def test_the_tokens_of_a_reply_can_be_walked_with_the_keys(page, say):
    reply = say(page, "colour")
    reply.get_by_role("button", name="Tokens", exact=True).click()
    tokens = reply.locator(".token")
    assert "".join(tokens.all_text_contents()) == reply.locator(".body").inner_text()
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    assert page.locator("#peek .chosen dt").inner_text() == "␣see"
    assert "see" in page.locator("#announcer").inner_text()
    assert "Layer 1: expert" in page.locator("#announcer").inner_text()
    page.keyboard.press("End")
    assert page.locator("#peek .chosen dt").inner_text() == "."


def test_tokens_take_the_colours_of_a_layers_experts(page, say):
    reply = say(page, "colour")
    reply.get_by_role("button", name="Tokens", exact=True).click()
    before = reply.locator(".token").first.evaluate("(node) => node.style.backgroundColor")
    reply.locator(".chooser select").select_option(label="Expert, layer 3")
    after = reply.locator(".token").first.evaluate("(node) => node.style.backgroundColor")
    assert after.startswith("hsla") or after.startswith("rgba")
    assert before != after


def test_experts_are_counted_by_layer(page, server, say):
    from fake_server import EXPERTS, LAYERS, SCRIPT, _route, tokens

    reply = say(page, "colour")
    reply.get_by_role("button", name="Experts", exact=True).click()
    assert "Layer 1:" in reply.locator("canvas").get_attribute("aria-label")
    reply.locator("summary").click()
    rows = reply.locator(".heat tbody tr")
    counted = [[int(c) for c in row.locator("td").all_inner_texts()] for row in rows.all()]
    routes = [_route(i, text) for i, text in enumerate(tokens(SCRIPT["colour"]))]
    expected = [
        [sum(route[layer] == [expert] for route in routes) for expert in range(EXPERTS)]
        for layer in range(len(LAYERS))
    ]
    assert counted == expected
    assert rows.locator("th").all_inner_texts() == [f"Layer {n}" for n in LAYERS]
    painted = reply.locator("canvas").evaluate(
        "(node) => node.getContext('2d').getImageData(2, 2, 1, 1).data[3]"
    )
    assert painted == 255


def test_experts_without_probabilities_still_name_their_tokens(page, say):
    page.click("#open-settings")
    page.uncheck("[name=probabilities]")
    reply = say(page, "colour")
    reply.get_by_role("button", name="Tokens", exact=True).click()
    reply.locator(".token").nth(1).hover()
    assert page.locator("#peek .chosen").inner_text() == "␣see"
    assert page.locator("#peek .routes > span").count() == 4
