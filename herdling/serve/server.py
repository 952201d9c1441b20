"""Running the server as a process: the port first, then the model, and an orderly end.

    status = run(settings, lambda: herdling.load(path), host="127.0.0.1", port=8000)

SIGTERM or Ctrl-C: no new connections, open calls are answered, at the deadline cut and answered, then
status 0; a second signal ends at once. A model that cannot be loaded, or an engine that fails: the reason
stays on `/health` for a moment, open calls get their errors, then status 1.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from herdling.errors import ConfigError, Error
from herdling.serve.app import create
from herdling.serve.service import Service, Settings

if TYPE_CHECKING:
    from herdling.guard.judges import Judge
    from herdling.infer.lm import LM

log = logging.getLogger(__name__)
FAREWELL_SECONDS = 1.0
"""How long a failed server still says why."""


class Server(uvicorn.Server):
    """uvicorn with our way to end: its own would end by the signal, with that as the status."""

    def __init__(self, config: uvicorn.Config, service: Service, seconds: float) -> None:
        super().__init__(config)
        self._service, self._seconds = service, seconds
        self.status = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `signals` has been entered before anything was started

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end this server, in an orderly way the first time."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread; whoever runs us elsewhere ends us
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._service.draining:
            self.force_exit = self.should_exit = True
        else:
            log.info("stopping: %s", signal.Signals(sig).name)
            self.end()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        if self.status:  # loading failed before there was a loop to tell
            self._end_soon()
        await super().startup(sockets)

    def end(self) -> None:
        """Stop accepting; cut what is still open after the deadline. Any thread may ask."""
        self._service.draining = True
        self.should_exit = True

    def failed(self, reason: str) -> None:
        """End with status 1, after a moment in which `/health` says why. From any thread."""
        self.status = 1
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._end_soon)

    def _end_soon(self) -> None:
        asyncio.get_running_loop().call_later(FAREWELL_SECONDS, self.end)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, let calls end, cut them at the deadline."""
        worker = self._service.worker
        cutting = asyncio.create_task(self._cut()) if worker is not None else None
        await super().shutdown(sockets)
        if cutting is not None:
            cutting.cancel()
        # Joining takes as long as a step, in which the loop has nothing left to do.
        self._service.close()

    async def _cut(self) -> None:
        worker = self._service.worker
        if worker is not None and not await worker.drained(self._seconds):
            log.warning("%d requests are cut after %g s", worker.open, self._seconds)
            worker.cut_all()


def run(
    settings: Settings,
    load: "Callable[[], LM]",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    shutdown_seconds: float = 25.0,
    connections: int | None = None,
    on_open: Callable[[str], None] = lambda url: None,
    judge: "Callable[[], Judge] | None" = None,
) -> int:
    """Serve until a signal or a failure; returns the exit status.

    `load` (and `judge`, which opens the safeguards) runs in a thread of its own while calls are answered
    503; `on_open` gets the address when the
    port is open. Port 0 takes a free one. Raises ConfigError if the address cannot be had.
    """
    listener = bind(host, port)
    service = Service(settings)
    config = uvicorn.Config(
        create(service),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=connections,
        # Beyond the deadline, after which every reply is cut, only a client that does not read is left.
        timeout_graceful_shutdown=max(1, round(shutdown_seconds + 3)),
    )
    server = Server(config, service, shutdown_seconds)
    service.on_failure = server.failed
    loader = threading.Thread(target=_load, args=(service, server, load, judge), daemon=True)
    try:
        with server.signals():
            loader.start()
            on_open(address(listener))
            server.run([listener])
    finally:
        listener.close()
        service.close()
    log.info("stopped")
    if loader.is_alive() or service.busy:
        # Python cannot end while another thread is deep in a library, and there is nothing to save.
        logging.shutdown()
        os._exit(server.status)
    return server.status


def _load(
    service: Service,
    server: Server,
    load: "Callable[[], LM]",
    judge: "Callable[[], Judge] | None",
) -> None:
    begun = time.monotonic()
    try:
        lm = load()
        if server.should_exit:
            return
        service.ready(lm, judge=None if judge is None else judge())
    except Exception as problem:
        if server.should_exit:
            return
        known = isinstance(problem, Error | OSError)
        service.failure = str(problem) if known else f"{type(problem).__name__}: {problem}"
        log.critical("the model cannot be loaded: %s", problem, exc_info=None if known else problem)
        server.failed(service.failure)
    else:
        log.info("ready after %.1f s", time.monotonic() - begun)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ConfigError with the reason."""
    if not 0 <= port < 65536:
        raise ConfigError(f"port is {port}; it must be 0 to 65535")
    listener = None
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(2048)
    except OSError as problem:
        if listener is not None:
            listener.close()
        raise ConfigError(
            f"host {host}, port {port}: {problem.strerror}; remedy: another --host or --port"
        ) from None
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
