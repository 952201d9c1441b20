"""Which pictures a message may point to, and fetching them.

Always allowed: base64 in a data URI (or bare, in an `image` part). Only if the server was started so:
http(s) URLs of listed hosts, and `file:` URLs within one folder. A listed host is resolved once, all
of its addresses must be public, and the connection goes to the address that was checked: a name that
points inwards (or does so the second time it is asked) reaches nothing. Redirects are not followed.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit

from herdling.errors import InputError
from herdling.serve.errors import ApiError, bad_request, too_large

if TYPE_CHECKING:
    from herdling.serve.limits import Limits

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True)
class Policy:
    """Where pictures may come from beside data URIs."""

    hosts: tuple[str, ...] = ()
    """Hosts that may be fetched from: `example.org`, `.example.org` for all below it, `host:8443`."""
    folder: Path | None = None
    """`file:` URLs may name files in here."""
    seconds: float = 10.0
    """Longest time of one fetch."""
    resolve: Callable[[str, int], list[str]] = _resolve
    """Host and port to addresses."""


def count(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many parts of the messages are pictures."""
    return sum(_is_picture(part) for message in messages for part in _parts(message))


def opened(
    messages: Sequence[Mapping[str, Any]], policy: Policy, limits: "Limits"
) -> list[Mapping[str, Any]]:
    """The messages with every picture decoded, within policy and limits. Blocks.

    Raises ApiError 400 or 413 naming the part.
    """
    number = count(messages)
    if number > limits.images:
        raise bad_request(f"{number} pictures; at most {limits.images} are allowed", "messages")
    return [_shown(message, f"messages[{i}]", policy, limits) for i, message in enumerate(messages)]


def _shown(
    message: Mapping[str, Any], where: str, policy: Policy, limits: "Limits"
) -> Mapping[str, Any]:
    parts = _parts(message)
    if not any(map(_is_picture, parts)):
        return message
    shown = []
    for j, part in enumerate(parts):
        if _is_picture(part):
            image = _opened(part, f"{where}.content[{j}]", policy, limits)
            part = {"type": "image", "image": image}
        shown.append(part)
    return {**message, "content": shown}


def _opened(part: Mapping[str, Any], where: str, policy: Policy, limits: "Limits") -> Any:
    from herdling.inputs.image_files import open_image

    source = part.get("image", part.get("image_url"))
    source = source.get("url") if isinstance(source, Mapping) else source
    try:
        return open_image(read(source, policy, limits.image_bytes), limits.megapixels)
    except InputError as problem:
        raise bad_request(f"{where}: {problem}", where) from None
    except ApiError as problem:
        words = f"{where}: {problem.message}"
        raise ApiError(
            problem.status, words, param=where, code=problem.code, headers=problem.headers
        ) from None


def read(source: Any, policy: Policy, most: int) -> bytes:
    """The bytes that a URL or base64 text stands for. Blocks. Raises ApiError or InputError."""
    if not isinstance(source, str) or not source:
        raise bad_request("a picture needs a URL, such as data:image/png;base64,...")
    scheme = source[: source.find(":")].lower() if ":" in source[:16] else "data"
    if scheme == "data":
        return _data(source, most)
    if scheme == "file":
        return _file(source, policy, most)
    if scheme in _PORTS:
        return _remote(source, policy, most)
    raise bad_request(f"pictures come from data:, http:, https: or file: URLs, not {scheme}:")


def _data(source: str, most: int) -> bytes:
    head, comma, text = source.partition(",") if source[:5].lower() == "data:" else ("", "", source)
    if head and not (comma and head.lower().endswith(";base64")):
        raise bad_request("a data URI must be base64: data:image/png;base64,...")
    if len(text) > most * 1.4 + 1024:
        raise too_large(f"a picture has more than {most} bytes")
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise bad_request(f"the picture is not valid base64: {problem}") from None
    return _bounded(data, most)


def _bounded(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise too_large(f"a picture has {len(data)} bytes; at most {most} are allowed")
    return data


def _file(source: str, policy: Policy, most: int) -> bytes:
    if policy.folder is None:
        raise bad_request("file: URLs are not allowed here; send the picture as a data URI")
    parts = urlsplit(source)
    refused = bad_request("this file: URL is not a picture in the folder that was set up for them")
    if parts.netloc not in ("", "localhost"):
        raise refused
    try:
        folder = policy.folder.resolve(strict=True)
        # Links are followed first, so that what is opened is what was judged.
        path = (folder / unquote(parts.path)).resolve(strict=True)
        if not path.is_relative_to(folder) or not path.is_file():
            raise refused
        with path.open("rb") as file:
            return _bounded(file.read(most + 1), most)
    except (OSError, ValueError):  # missing, too long a name, a null byte: told apart by nobody
        raise refused from None


# ---- remote pictures


def _remote(source: str, policy: Policy, most: int) -> bytes:
    if not policy.hosts:
        raise bad_request("pictures are not fetched from URLs here; send it as a data URI")
    try:
        url = urlsplit(source)
        host = (url.hostname or "").rstrip(".").encode("idna").decode().lower()
        port = url.port or _PORTS[url.scheme.lower()]
    except (ValueError, UnicodeError):
        raise bad_request(f"{source[:80]!r} is not a usable URL") from None
    if url.username is not None or not _listed(host, port, url.scheme.lower(), policy.hosts):
        raise bad_request(f"pictures are not fetched from {host[:80]!r}; send it as a data URI")
    deadline = time.monotonic() + policy.seconds
    try:
        address = public_address(policy.resolve(host, port), host)
        with contextlib.closing(socket.create_connection((address, port), policy.seconds)) as plain:
            return _get(plain, url, host, port, deadline, most)
    except (OSError, http.client.HTTPException, ValueError) as problem:
        raise bad_request(
            f"the picture could not be fetched from {host}: {_words(problem)}"
        ) from None


def _listed(host: str, port: int, scheme: str, hosts: Sequence[str]) -> bool:
    for entry in hosts:
        name, _, own = entry.lower().partition(":")
        if port == (int(own) if own else _PORTS[scheme]) and (
            host == name or (name.startswith(".") and host.endswith(name))
        ):
            return True
    return False


def public_address(addresses: Sequence[str], host: str) -> str:
    """The first of a host's addresses; ApiError 400 unless every one of them is public."""
    if not addresses:
        raise bad_request(f"{host} has no address")
    for text in addresses:
        if not is_public(text):
            raise bad_request(f"{host} has an address that is not public; nothing is fetched there")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether an address is one of the open internet, also where IPv6 wraps an IPv4 address."""
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if not all(is_public(str(a)) for a in inner if a is not None):
            return False
    return address.is_global and not address.is_multicast


def _get(
    plain: socket.socket, url: SplitResult, host: str, port: int, deadline: float, most: int
) -> bytes:
    """The body of a plain GET over a connected socket, which is the only place asked."""
    secure = url.scheme.lower() == "https"
    wire = plain
    if secure:
        wire = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    default = _PORTS[url.scheme.lower()]
    connection = http.client.HTTPConnection(host, port)
    connection.sock = wire
    name = host if port == default else f"{host}:{port}"
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    with contextlib.closing(connection):
        # Host is given, since http.client would add the port to it where it is not 80.
        connection.request("GET", target, headers={"Host": name, "User-Agent": "herdling"})
        with contextlib.closing(connection.getresponse()) as answer:
            if answer.status != 200:
                raise bad_request(
                    f"the picture could not be fetched: {host} answered {answer.status}"
                    + (" (redirects are not followed)" if 300 <= answer.status < 400 else "")
                )
            return _body(answer, wire, host, deadline, most)


def _body(
    answer: http.client.HTTPResponse, wire: socket.socket, host: str, deadline: float, most: int
) -> bytes:
    """All that is sent, if it is not too much and comes in time."""
    data = b""
    while piece := answer.read1(65536):
        data += piece
        if len(data) > most:
            raise too_large(f"the picture at {host} has more than {most} bytes")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        wire.settimeout(left)
    return data


def _words(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def _parts(message: Any) -> list[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return [p for p in content if isinstance(p, Mapping)] if isinstance(content, list) else []


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url")
