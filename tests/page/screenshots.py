"""The pictures of docs/page.md, taken from the page against the scripted server.

python tests/page/screenshots.py docs
"""

import argparse
import io
import os
import shutil
from pathlib import Path
from typing import Any

from conftest import FLAGS
from fake_server import FakeServer
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from herdling.serve.app import CONTENT_SECURITY_POLICY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright, FakeServer(CONTENT_SECURITY_POLICY) as server:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        server.delay = 0.004

        page = opened(browser, server, 1180, 830, "light")
        earlier(page)
        say(page, "Please write the guide to keeping a herd")
        page.get_by_role("button", name="Experts", exact=True).last.click()
        page.locator(".panel").last.scroll_into_view_if_needed()
        page.mouse.move(*middle(page, ".assistant:last-child .body ol li em"), steps=3)
        page.wait_for_selector("#peek:not([hidden])")
        save(page, out / "page-light.png")

        page = opened(browser, server, 1180, 760, "dark")
        earlier(page)
        page.set_input_files(
            "#file", {"name": "shapes.png", "mimeType": "image/png", "buffer": shapes()}
        )
        page.wait_for_selector("#attached li")
        say(page, "Which colour has what?")
        page.get_by_role("button", name="Tokens", exact=True).last.click()
        page.locator(".chooser select").select_option(label="Expert, layer 3")
        page.set_input_files(
            "#file", {"name": "shapes-2.png", "mimeType": "image/png", "buffer": shapes()}
        )
        page.wait_for_selector("#attached li")
        page.fill("#text", "And in this one?")
        page.locator(".token").nth(10).hover()
        page.wait_for_timeout(200)
        save(page, out / "page-dark.png")

        page = opened(browser, server, 390, 780, "light")
        say(page, "Please write the guide")
        page.locator("#scroller").evaluate("(node) => (node.scrollTop = 0)")
        page.wait_for_timeout(100)
        save(page, out / "page-phone.png")

        page = opened(browser, server, 1180, 830, "light")
        earlier(page)
        page.click("#open-dashboard")
        page.wait_for_timeout(45_000)
        save(page, out / "page-dashboard.png")
        browser.close()


def opened(browser: Any, server: FakeServer, width: int, height: int, theme: str) -> Any:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, device_scale_factor=1
    )
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    return page


def earlier(page: Any) -> None:
    """A few conversations for the list."""
    for text in ("What colour is wool?", "Sort these numbers: 8 3 5", "Greetings in umlaut"):
        say(page, text)
        page.click("#new")


def say(page: Any, text: str) -> None:
    count = page.locator(".message.assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator(".message.assistant:not(.writing)").nth(count).wait_for()
    page.wait_for_timeout(150)


def middle(page: Any, selector: str) -> tuple[float, float]:
    box = page.locator(selector).first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def shapes() -> bytes:
    image = Image.new("RGB", (168, 112), (244, 240, 232))
    draw = ImageDraw.Draw(image)
    draw.rectangle((22, 30, 72, 80), fill=(190, 60, 45))
    draw.ellipse((96, 34, 144, 82), fill=(45, 95, 160))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def save(page: Any, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
