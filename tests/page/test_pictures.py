"""Pictures: chosen, pasted and dropped, cut into tiles as the model's processor does, kept small."""

import base64
import io

import pytest
from PIL import Image

from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.images import best_canvas, fitted_size

pytestmark = pytest.mark.page

X = "\N{MULTIPLICATION SIGN}"


def png(width: int, height: int, noisy: bool = False) -> bytes:
    if noisy:
        image = Image.effect_noise((width, height), 90).convert("RGB")
    else:
        image = Image.new("RGB", (width, height), (180, 60, 40))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def file(name: str, data: bytes, kind: str = "image/png") -> dict:
    return {"name": name, "mimeType": kind, "buffer": data}


def sent_picture(body: dict) -> Image.Image:
    url = body["messages"][-1]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_a_chosen_file_is_shown_with_its_tiles_and_sent(page, server, say, until):
    page.set_input_files("#file", [file("a.png", png(168, 112)), file("b.png", png(40, 40))])
    until(page, "document.querySelectorAll('#attached li').length === 2")
    assert f"3 {X} 2 + 1 tiles" in page.locator("#attached li").first.inner_text()
    assert "1 tile" in page.locator("#attached li").nth(1).inner_text()
    reply = say(page, "how many pictures?")
    assert reply.locator(".body").inner_text() == "I was shown 2 pictures."
    assert sent_picture(server.bodies[0]).size == (168, 112)
    assert page.locator("#attached li").count() == 0
    page.reload()
    until(page, "document.querySelector('.pictures img').naturalWidth === 168")


def test_pasted_and_dropped_pictures_are_taken(page, server, until):
    data = base64.b64encode(png(60, 60)).decode()
    give = """([data, kind, target]) => {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], kind + '.png', {type: 'image/png'}));
        const event = kind === 'paste'
            ? new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true})
            : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.querySelector(target).dispatchEvent(event);
    }"""
    page.evaluate(give, [data, "paste", "#text"])
    until(page, "document.querySelectorAll('#attached li').length === 1")
    page.evaluate(give, [data, "dragover", "#thread"])
    assert page.locator("#chat.dropping").count() == 1
    page.evaluate(give, [data, "drop", "#thread"])
    until(page, "document.querySelectorAll('#attached li').length === 2")
    assert page.locator("#chat.dropping").count() == 0
    page.get_by_role("button", name="Remove paste.png").click()
    assert page.locator("#attached .name").all_inner_texts() == ["drop.png"]


def test_large_pictures_are_made_small_before_they_are_kept(page, server, say):
    page.set_input_files("#file", file("photo.png", png(2400, 1200, noisy=True)))
    page.wait_for_selector("#attached li")
    say(page, "pictures")
    assert sent_picture(server.bodies[0]).size == (1344, 672)
    assert page.evaluate("JSON.stringify(localStorage).length") < 1_500_000


def test_what_is_no_picture_is_refused_in_words(page):
    page.set_input_files("#file", file("notes.png", b"these are notes"))
    page.wait_for_selector("text=notes.png is not a picture that this browser can read")
    assert page.locator("#attached li").count() == 0


def test_a_text_model_takes_no_pictures(page, server):
    server.vision = False
    page.reload()
    page.wait_for_selector("#attach:disabled")


def test_the_viewer_shows_the_grid(page, server):
    page.set_input_files("#file", file("a.png", png(168, 112)))
    page.get_by_role("button", name="Show a.png").click()
    dialog = page.locator("dialog.viewer")
    assert f"168 {X} 112 pixels; 3 {X} 2 + 1 tiles" in dialog.inner_text()
    box = dialog.locator(".tiled").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(3 / 2, rel=0.01)
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.viewer", state="detached")


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize(("size", "most"), [(336, 16), (56, 6), (28, 1)])
def test_the_tiling_is_the_processors(page, size, most, enlarge):
    processor = ImageProcessor(
        size=size, max_tiles=most, patch_size=14, resize_to_max_canvas=enlarge
    )
    sizes = [(w, h) for w in (1, 50, 300, 337, 900, 5000) for h in (1, 56, 336, 700, 2500)]
    vision = {"size": size, "maxTiles": most, "tokensPerTile": 4, "enlarge": enlarge}
    theirs = page.evaluate(
        """async ([sizes, vision]) => {
            const {tiling, fitted} = await import('./tiles.js');
            return sizes.map(([w, h]) => {
                const grid = tiling(w, h, vision);
                return [grid.rows, grid.columns, ...fitted(w, h, grid, vision)];
            });
        }""",
        [sizes, vision],
    )
    for given, (rows, columns, width, height) in zip(sizes, theirs, strict=True):
        assert (rows, columns) == best_canvas(given, processor), given
        ours = fitted_size(given, rows, columns, processor)
        assert (width, height) == pytest.approx(ours, abs=1.5), given
