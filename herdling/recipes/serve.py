"""`herdling serve`: answer OpenAI's API, and others, with one model; with a page to chat in.

    herdling serve runs/demo/model
    herdling serve runs/demo/model --host 0.0.0.0 --api-key-file keys.txt

The port opens at once and says 503 until the model is loaded. Containers are told through the
environment: HERDLING_MODEL, HERDLING_NAME, HERDLING_HOST, HERDLING_PORT are the defaults of the settings
of these names, and HERDLING_API_KEY holds keys with commas between them.
"""

import ipaddress
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from herdling.errors import ConfigError, require

if TYPE_CHECKING:
    from herdling.guard.judges import Judge
    from herdling.infer.lm import LM
    from herdling.serve.service import Settings

_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def _port() -> int:
    given = os.environ.get("HERDLING_PORT", "8000")
    if not given.isdecimal():
        raise ConfigError(f"HERDLING_PORT is {given!r}; it must be a port, such as 8000")
    return int(given)


@dataclass(frozen=True)
class Config:
    """Serve a model over HTTP: OpenAI's API and others, and a page to chat in."""

    path: Annotated[Positional[str], arg(metavar="MODEL")] = field(
        default_factory=lambda: os.environ.get("HERDLING_MODEL", "")
    )
    """Model folder or hub name; default: that in HERDLING_MODEL."""
    host: str = field(default_factory=lambda: os.environ.get("HERDLING_HOST", "127.0.0.1"))
    """Address to listen on; 0.0.0.0 is every IPv4 address of this machine."""
    port: int = field(default_factory=_port)
    """Port to listen on; 0 takes a free one."""
    name: str | None = field(default_factory=lambda: os.environ.get("HERDLING_NAME"))
    """The model's name in the APIs; default: that of its folder, or of its run."""
    alias: UseAppendAction[tuple[str, ...]] = ()
    """A further name for the model; may be given several times."""
    api_key: UseAppendAction[tuple[str, ...]] = ()
    """A key that clients must send; may be given several times. A file or the environment
    (HERDLING_API_KEY) keep it out of the process list."""
    api_key_file: Path | None = None
    """A file with one key a line."""
    adapter: UseAppendAction[tuple[str, ...]] = ()
    """NAME=DIR of an adapter that can be asked for as a model; may be given several times."""
    max_batch: int = 64
    """Most requests that are decoded together."""
    step_tokens: int = 512
    """Most tokens of a step: smaller keeps others smoother while a long prompt is read."""
    memory: str | None = None
    """Memory for keys and values, such as 800M or 4G; default: a quarter of what is free."""
    prefix_reuse: bool = True
    """Keep keys and values of past prompts for prompts that begin the same."""
    kv: Literal["plain", "int8", "int4", "mixed"] = "plain"
    """How keys and values are kept: in the model's type, or coded in less memory."""
    draft: str | None = None
    """Guess tokens ahead: `ngram`, or the folder of a smaller model with the same tokenizer."""
    max_queue: int = 256
    """Requests that may wait; calls beyond are answered 429."""
    max_prompt_tokens: int | None = None
    """Longest prompt; default: the model's context."""
    max_tokens: int | None = None
    """Most new tokens that a call may get; default: the model's context."""
    default_max_tokens: int = 4096
    """Most new tokens of a chat reply where the call does not say."""
    max_body: str = "32M"
    """Largest request body."""
    max_images: int = 16
    """Most pictures of a call."""
    max_megapixels: float = 32.0
    """Largest picture."""
    image_host: UseAppendAction[tuple[str, ...]] = ()
    """A host from which pictures may be fetched (.example.org for all below it); may be given several
    times. By default none: pictures come as data URIs."""
    image_folder: Path | None = None
    """A folder whose pictures may be named by file: URLs."""
    request_seconds: float = 600.0
    """A reply that takes longer is cut and sent as it is; 0 for no limit."""
    shutdown_seconds: float = 25.0
    """How long open calls may go on after SIGTERM or Ctrl-C, before they are cut."""
    tool_dialect: Literal["pythonic", "json"] = "pythonic"
    """How the model is asked to write tool calls."""
    cors_origin: UseAppendAction[tuple[str, ...]] = ()
    """A web origin (https://app.example.org, or *) whose pages may call; may be given several times."""
    trust_host: UseAppendAction[tuple[str, ...]] = ()
    """A further name under which browsers may reach a server on a local address without keys."""
    guard: UseAppendAction[tuple[str, ...]] = ()
    """A folder that judges what comes in and goes out: of `herdling guard`, or a Llama Guard 4; may be
    given several times."""
    guard_policy: Path | None = None
    """A YAML file that says what each category brings about; default: everything is blocked."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of the log lines."""
    log_format: Literal["auto", "json", "plain"] = "auto"
    """One JSON object a line, plain text, or plain on a terminal and JSON elsewhere."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the folder's own."""
    device: str | None = None
    """Where to run, for example cpu or cuda; default: a GPU if there is one."""


def main(config: Config) -> int:
    """Serve until stopped. Raises ConfigError before the port opens for settings that cannot be."""
    require("uvicorn", "serve")
    require("fastapi", "serve")
    require("prometheus_client", "serve")
    settings = read(config)
    adapters = read_adapters(config.adapter)
    for guard in config.guard:
        _check_path(guard)
    memory = None if config.memory is None else read_size("memory", config.memory)
    for name in ("max_batch", "step_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    _check_path(config.path)
    from herdling.serve import logs, server

    def load() -> "LM":
        from herdling.infer import lm as loading
        from herdling.infer.engine import Engine

        lm = loading.load(config.path, config.dtype, config.device, adapters or None)
        lm.engine = Engine(
            lm.model,
            lm.tokenizer,
            memory=memory,
            max_running=config.max_batch,
            step_tokens=config.step_tokens,
            reuse=config.prefix_reuse,
            kv=config.kv,
            drafter=None if config.draft is None else loading.open_draft(config.draft, lm),
            adapt_threads=True,
        )
        # What the first request would wait for (native kernels are compiled once, the cache is made)
        # belongs to loading.
        lm.generate([[lm.tokenizer.bos]], max_tokens=1)
        return lm

    logs.set_up(config.log_level, config.log_format)
    return server.run(
        settings,
        load,
        host=config.host,
        port=config.port,
        shutdown_seconds=config.shutdown_seconds,
        judge=opener(config.guard, config.dtype, config.device),
        on_open=lambda url: print(f"{settings.name} on {url}", file=sys.stderr, flush=True),
    )


def opener(
    guards: Sequence[str], dtype: str | None, device: str | None
) -> "Callable[[], Judge] | None":
    """What opens the safeguards, later and elsewhere; None if there are none."""

    def open_all() -> "Judge":
        from herdling.guard.judges import Judges, ModelJudge, open_judge
        from herdling.infer.engine import Engine

        judges = [open_judge(guard, dtype, device) for guard in guards]
        for judge in judges:
            if isinstance(judge, ModelJudge):
                lm = judge.lm
                lm.engine = Engine(lm.model, lm.tokenizer, adapt_threads=True)
        return Judges(judges)

    return open_all if guards else None


def _check_path(path: str) -> None:
    """Raise CheckpointError for a folder that is not there, before anything starts.

    A hub name is left to the loader: it may take minutes to come. What is there is not looked into,
    which would bring torch along before the port is open.
    """
    if not path:
        raise ConfigError("path is missing; name a model folder, or set HERDLING_MODEL")
    if not Path(path).is_dir() and (Path(path).exists() or path.count("/") != 1):
        from herdling.checkpoint.source import resolve

        resolve(path)


def _name_of(path: str) -> str:
    """The folder's name, or that of its run: `demo` for runs/demo/model."""
    folder = Path(path).resolve()
    return (folder.parent.name if folder.name == "model" else folder.name) or "herdling"


def read(config: Config) -> "Settings":
    """The server's settings. Raises ConfigError."""
    from herdling.guard.policy import read_policy
    from herdling.serve.images import Policy
    from herdling.serve.limits import Limits
    from herdling.serve.service import Settings

    if config.image_folder is not None and not config.image_folder.is_dir():
        raise ConfigError(f"image_folder {config.image_folder} is not a folder")
    for name in ("max_images", "request_seconds", "shutdown_seconds", "max_megapixels"):
        if not 0 <= (value := getattr(config, name)) < math.inf:
            raise ConfigError(f"{name} is {value}; it must be 0 or more, and finite")
    keys = read_keys(config)
    local = not keys and _is_local(config.host)
    own = Limits()
    limits = Limits(
        body_bytes=read_size("max_body", config.max_body),
        prompt_tokens=_positive("max_prompt_tokens", config.max_prompt_tokens),
        max_tokens=_positive("max_tokens", config.max_tokens),
        default_max_tokens=_positive("default_max_tokens", config.default_max_tokens) or 1,
        images=config.max_images,
        image_bytes=own.image_bytes,
        megapixels=config.max_megapixels,
        queue=_positive("max_queue", config.max_queue) or own.queue,
        seconds=config.request_seconds or None,
    )
    name, adapters = config.name or _name_of(config.path), tuple(read_adapters(config.adapter))
    if hidden := next((own for own in adapters if own in (name, *config.alias)), None):
        raise ConfigError(f"adapter {hidden}: the model itself answers to that name; give another")
    return Settings(
        name=name,
        aliases=config.alias,
        adapters=adapters,
        keys=keys,
        dialect=config.tool_dialect,
        limits=limits,
        pictures=Policy(config.image_host, config.image_folder),
        policy=read_policy(config.guard_policy, config.guard),
        trusted=(*_LOCAL, config.host, *config.trust_host) if local else (),
        origins=config.cors_origin,
    )


def read_keys(config: Config) -> tuple[str, ...]:
    """The API keys of flags, file and environment, each once. Raises ConfigError."""
    keys = [*config.api_key, *os.environ.get("HERDLING_API_KEY", "").split(",")]
    if config.api_key_file is not None:
        try:
            keys += config.api_key_file.read_text("utf-8").splitlines()
        except OSError as problem:
            raise ConfigError(f"api_key_file {config.api_key_file}: {problem.strerror}") from None
        except UnicodeDecodeError as problem:
            raise ConfigError(f"api_key_file {config.api_key_file}: {problem}") from None
    found = tuple(dict.fromkeys(key.strip() for key in keys if key.strip()))
    if not found and (config.api_key or config.api_key_file is not None):
        raise ConfigError("api_key is empty; give a key, or leave the setting out")
    return found


def read_adapters(given: tuple[str, ...]) -> dict[str, str]:
    """Names to folders. Raises ConfigError."""
    found: dict[str, str] = {}
    for entry in given:
        name, equals, folder = entry.partition("=")
        if not equals or not name or not folder or name in found:
            raise ConfigError(f"adapter is {entry!r}; give NAME=DIR, each name once")
        found[name] = folder
    return found


def read_size(name: str, text: str) -> int:
    """Bytes of `800M`, `4G`, `1.5GiB` or a plain number; units are powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    size = int(float(found[1]) * _SIZES[found[2]]) if found else 0
    if size < 1:
        raise ConfigError(f"{name} is {text!r}; give bytes such as 800M or 4G")
    return size


def _positive(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")
    return value


def _is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
