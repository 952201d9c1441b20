"""Where pictures may come from: python -m pytest tests/serve/test_images.py"""

import base64
import contextlib
import http.server
import io
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from herdling.serve import images
from herdling.serve.errors import ApiError
from herdling.serve.images import Policy, is_public, opened, read
from herdling.serve.limits import Limits

MOST = 10_000
PUBLIC = "93.184.215.14"


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


def data_uri(raw: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def message(*urls: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "?"}, *parts]}]


def refused(source, policy: Policy | None = None, most: int = MOST) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(source, policy or Policy(), most)
    return caught.value


def test_data_uris_and_bare_base64():
    assert read(data_uri(png()), Policy(), MOST) == png()
    assert read(base64.b64encode(png()).decode(), Policy(), MOST) == png()
    (shown,) = opened(message(data_uri(png())), Policy(), Limits())
    assert shown["content"][1]["image"].size == (8, 8)


@pytest.mark.parametrize(
    "source",
    [
        "",
        None,
        5,
        "data:image/png,abc",
        "data:image/png;base64,*",
        "ftp://a/b",
        "javascript:x",
        "a b*",
    ],
)
def test_what_is_no_picture_source(source):
    assert refused(source).status == 400


def test_too_many_bytes_pixels_and_pictures():
    assert refused(data_uri(b"x" * (MOST + 1))).status == 413
    assert refused(data_uri(b"x" * 50), most=40).status == 413
    for limits, urls in (
        (Limits(megapixels=1e-5), [data_uri(png())]),
        (Limits(images=1), [data_uri(png())] * 2),
        (Limits(), [data_uri(b"no picture")]),
    ):
        with pytest.raises(ApiError) as caught:
            opened(message(*urls), Policy(), limits)
        assert caught.value.status == 400
    with pytest.raises(ApiError, match=r"messages\[0\].content\[1\]"):
        opened(message(data_uri(png())), Policy(), Limits(image_bytes=10))


# ---- files


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    (folder / "a b.png").write_bytes(png())
    (folder / "below" / "c.png").write_bytes(png(4))
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "out").symlink_to(tmp_path / "secret.png")
    (folder / "in").symlink_to(folder / "a b.png")
    return folder


def test_files_of_the_folder(folder):
    policy = Policy(folder=folder)
    inside = [
        f"file://{folder}/a%20b.png",
        "file:a%20b.png",
        f"file://{folder}/in",
        f"file://localhost{folder}/in",
    ]
    for url in inside:
        assert read(url, policy, MOST) == png(), url
    assert read(f"file://{folder}/below/c.png", policy, MOST) == png(4)


def test_files_elsewhere_are_all_refused_alike(folder, tmp_path):
    outside = [
        f"file://{tmp_path}/secret.png", f"file://{folder}/../secret.png", "file:../secret.png",
        f"file://{folder}/%2e%2e/secret.png", f"file://{folder}/out", f"file://{folder}/missing.png",
        f"file://{folder}", f"file://otherhost{folder}/in", f"file://{folder}/%00", "file:" + "x" * 5000,
        "file:///etc/passwd",
    ]  # fmt: skip
    errors = {str(refused(url, Policy(folder=folder)).message) for url in outside}
    assert len(errors) == 1
    assert refused(f"file://{folder}/in").status == 400  # without a folder
    assert refused(f"file://{folder}/in", Policy(folder=folder), 10).status == 413


# ---- hosts


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:db8::1", "not an address", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], [PUBLIC, "fe80::1%2"], []],
)
def test_a_listed_name_that_points_inwards_reaches_nothing(addresses, monkeypatch):
    def connect(*args):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(images.socket, "create_connection", connect)
    policy = Policy(("pics.example",), resolve=lambda host, port: addresses)
    assert refused("http://pics.example/a.png", policy).status == 400


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png", "http://127.0.0.1/", "http://[::1]/", "http://2130706433/",
        "http://pics.example.evil.net/", "http://pics.example:8080/", "http://pics.example@evil.net/",
        "http://user@pics.example/", "http://x.pics.example/", "https://below.example/", "http:///a",
        "http://pics.example:99999/", "http://[oops/", "http://\u2488/", "http://" + "a" * 300 + "/",
    ],
)  # fmt: skip
def test_hosts_that_are_not_listed(url):
    def resolve(host, port):
        raise AssertionError(f"{host} was asked for")

    policy = Policy(("pics.example", ".below.example"), resolve=resolve)
    assert refused(url, policy).status == 400


def test_no_host_is_listed_by_default():
    assert "not fetched" in refused("https://example.org/a.png").message


class Pictures(http.server.BaseHTTPRequestHandler):
    """A server of pictures, with the ways in which one can misbehave."""

    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self):
        self.asked.append((self.path, self.headers["Host"]))
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self._say()

    def _say(self):
        if self.path != "/slow":
            self.wfile.write(b"x" * 100_000 if self.path == "/large" else png())
            return
        for _ in range(40):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    """A policy whose listed host resolves to a public address, where this server seems to be."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    real = images.socket.create_connection

    def connect(address, timeout):
        assert address == (PUBLIC, 80), "not the address that was checked"
        return real(server.server_address, timeout)

    monkeypatch.setattr(images.socket, "create_connection", connect)
    Pictures.asked.clear()
    yield Policy(("pics.example", ".below.example"), resolve=lambda h, p: [PUBLIC], seconds=0.5)
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_listed_host_is_asked_at_the_checked_address(host):
    assert read("http://Pics.Example./a.png?size=1#part", host, MOST) == png()
    assert read("http://deep.below.example/b.png", host, MOST) == png()
    assert Pictures.asked == [("/a.png?size=1", "pics.example"), ("/b.png", "deep.below.example")]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/away", 400, "redirects"),
        ("/missing", 400, "404"),
        ("/large", 413, "bytes"),
        ("/slow", 400, "could not"),
    ],
)
def test_a_listed_host_that_misbehaves(host, path, status, words):
    error = refused(f"http://pics.example{path}", host)
    assert error.status == status
    assert words in error.message


def test_a_name_is_resolved_once():
    answers = iter([["10.0.0.1"], [PUBLIC]])
    policy = Policy(("pics.example",), resolve=lambda h, p: next(answers))
    assert refused("http://pics.example/", policy).status == 400


def test_a_name_that_does_not_resolve():
    def resolve(host, port):
        raise OSError("no such name")

    assert (
        "no such name"
        in refused("http://a.example/", Policy(("a.example",), resolve=resolve)).message
    )


def test_pictures_through_the_api(make_service, ask, engine, lm):
    service = make_service(engine)
    body = {"messages": message(data_uri(png(30)), data_uri(png(500)))}
    reply = ask(service, "POST", "/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    tiles = engine.requests[0].tiles
    side = lm.processor.size
    assert tiles.shape[1:] == (3, side, side)
    assert (
        list(engine.requests[0].ids).count(lm.tokenizer.patch)
        == len(tiles) * lm.processor.tokens_per_tile
    )
    reply = ask(
        service, "POST", "/v1/chat/completions", json={"messages": message("http://127.0.0.1/")}
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[0].content[1]"
