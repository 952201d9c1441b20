"""The numbers behind `GET /herdling/status`."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import herdling

if TYPE_CHECKING:
    from herdling.serve.service import Service
    from herdling.serve.worker import Worker


def status(service: "Service") -> dict[str, Any]:
    """Everything; parts that are not there yet are None."""
    state, reason = service.state()
    worker = service.worker
    stats = worker.stats if worker is not None else None
    return {
        "status": state,
        "reason": reason,
        "name": service.settings.name,
        "names": service.names,
        "version": herdling.__version__,
        "uptime_seconds": time.time() - service.settings.created,
        "model": _model(service),
        "engine": None if stats is None else asdict(stats),
        "queue": {
            "open": worker.open if worker is not None else 0,
            "waiting": worker.waiting if worker is not None else 0,
            "limit": service.limits.queue,
        },
        "rates": _rates(worker),
        "memory": {
            "resident_bytes": resident(),
            "cache_bytes": None if stats is None else stats.pages * stats.page_bytes,
            "cache_used_bytes": None if stats is None else stats.pages_used * stats.page_bytes,
        },
    }


def _model(service: "Service") -> dict[str, Any] | None:
    """Facts of the config that people ask for."""
    lm = service.lm
    if lm is None:
        return None
    from herdling.quant.swap import main_format, size_of  # with torch, which is there by now

    text = lm.config.text
    return {
        "layers": text.num_hidden_layers,
        "moe_layers": [i for i in range(text.num_hidden_layers) if text.is_moe(i)],
        "experts": text.num_local_experts,
        "experts_per_token": text.num_experts_per_tok,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context": text.max_position_embeddings,
        "parameters": size_of(lm.model)[0],
        "dtype": main_format(lm.model),
        "device": str(lm.device),
        "vision": lm.processor is not None,
        "tile": None if lm.processor is None else lm.processor.size,
        "max_tiles": None if lm.processor is None else lm.processor.max_tiles,
    }


def _rates(worker: "Worker | None") -> dict[str, float]:
    """Tokens a second over the last seconds."""
    zero = {"prompt_tokens_per_second": 0.0, "new_tokens_per_second": 0.0}
    history = list(worker.history) if worker is not None else []
    now = time.monotonic()
    recent = [entry for entry in history if now - entry[0] < 5.0]
    if len(recent) < 2:
        return zero
    (began, first), (_, last) = recent[0], recent[-1]
    seconds = now - began
    read = (last.prompt_tokens - last.cached_tokens) - (first.prompt_tokens - first.cached_tokens)
    return {
        "prompt_tokens_per_second": read / seconds,
        "new_tokens_per_second": (last.new_tokens - first.new_tokens) / seconds,
    }


def resident() -> int | None:
    """Bytes of this process in memory, where the system tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
