"""A headless Chromium, a scripted server, and the page between them.

Needs Playwright (extra `page`) and a Chromium: $CHROMIUM, or `chromium` on the path. Every test ends
with the same checks: the page asked no other host, broke no content policy, threw nothing.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for fake_server

WAIT = 30  # seconds, for a machine that is busy with other things
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "no chromium: install Debian's package, or name one in $CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def policy() -> str:
    """The real server's own content policy."""
    from herdling.serve.app import CONTENT_SECURITY_POLICY

    return CONTENT_SECURITY_POLICY


@pytest.fixture
def server(policy: str) -> Iterator[Any]:
    from fake_server import FakeServer

    with FakeServer(policy) as server:
        yield server


class Watch:
    """What a browser context did that no page of ours may do."""

    def __init__(self, context: Any) -> None:
        self.hosts: set[str] = set()
        self.problems: list[str] = []
        self.expected: tuple[str, ...] = ("Failed to load resource", "net::ERR_")
        context.on("request", self._asked)
        context.on("console", self._said)
        context.on("weberror", lambda error: self.problems.append(f"thrown: {error.error}"))

    def _asked(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.hostname or parts.scheme)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(
            known in message.text for known in self.expected
        ):
            self.problems.append(message.text)

    def check(self) -> None:
        assert self.hosts <= {"127.0.0.1"}, f"the page asked {self.hosts}"
        assert self.problems == []


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """open_page(url, width=1200, height=800, **context options) -> a Playwright page."""
    opened = []

    def open(url: str, width: int = 1200, height: int = 800, **options: Any) -> Any:
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, **options)
        context.set_default_timeout(WAIT * 1000)
        watch = Watch(context)
        page = context.new_page()
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"
        )
        opened.append((context, watch))
        page.goto(url)
        return page

    yield open
    for context, watch in opened:
        context.close()
        watch.check()


@pytest.fixture
def page(server: Any, open_page: Callable[..., Any]) -> Any:
    return open_page(server.url)


@pytest.fixture
def until() -> Callable[..., None]:
    """until(page, expression) waits for it to be true; Playwright's own way needs unsafe-eval."""

    def wait(page: Any, expression: str, seconds: float = WAIT) -> None:
        end = time.monotonic() + seconds
        while not page.evaluate(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            page.wait_for_timeout(20)

    return wait


@pytest.fixture
def say() -> Callable[..., Any]:
    """say(page, text) sends a message and, unless wait=False, waits for the end of the reply."""

    def send(page: Any, text: str, wait: bool = True) -> Any:
        replies = page.locator(".message.assistant")
        count = replies.count()
        page.fill("#text", text)
        page.press("#text", "Enter")
        reply = replies.nth(count)
        reply.wait_for()
        if wait:
            page.locator(".message.assistant:not(.writing)").nth(count).wait_for()
            page.wait_for_selector("body:not(.replying)")
        return reply

    return send
