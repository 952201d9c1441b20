"""The compiled kernels as Python functions, or None and one note that says why not.

    library = loaded()           # builds at first use; None: use the torch path
    library.herdling_linear_bf16(x.data_ptr(), ...)

HERDLING_NATIVE=0 turns native kernels off; `native` (default), `avx2` and `plain` choose a variant.
Plain C functions through ctypes: nothing links to torch, so a library outlives torch's versions, and
Python's lock is free while one runs.
"""

import ctypes
import logging
import os
from functools import lru_cache

from herdling.kernels.cpu.build import BuildError, compiled

log = logging.getLogger(__name__)

P, I, N, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "linear": [P, P, P, I, I, I, N],
    "swiglu": [P, P, P, P, P, I, I, I, N],
    "experts": [P, P, P, P, P, P, I, I, I, I, I, N],
    "rms_norm": [P, P, P, I, I, F],
    "packed_linear": [P, P, P, I, N],
    "packed_swiglu": [P, P, P, P, I, N],
    "packed_experts": [P, P, P, P, P, P, I, I, I, N],
    "attention_step": [P, P, P, P, P, N],
    "feed_forward_step": [P, P, P, P, I, N],
    "layers_step": [P, I, P, P, I, N],
    "guess": [P, P, P, N],
}
TELLS = ("experts", "packed_experts", "attention_step", "layers_step", "guess")
"""What returns 1 where an index is out of range, and has done nothing."""


@lru_cache(maxsize=1)
def loaded() -> ctypes.CDLL | None:
    """The library this process uses, or None (with one warning, unless it was turned off)."""
    asked = os.environ.get("HERDLING_NATIVE", "native")
    if asked.lower() in ("0", "off", "false", "no"):
        return None
    try:
        return load("native" if asked in ("", "1") else asked)
    except (BuildError, OSError) as error:
        log.warning(
            "native CPU kernels are off, torch's are used (slower decode): %s. "
            "HERDLING_NATIVE=0 silences this.",
            error,
        )
        return None


@lru_cache(maxsize=8)
def load(variant: str) -> ctypes.CDLL:
    """Build and open one variant; BuildError or OSError where that fails."""
    library = ctypes.CDLL(str(compiled(variant)))
    library.herdling_features.restype = ctypes.c_char_p
    library.herdling_integer_features.restype = ctypes.c_char_p
    library.herdling_read.argtypes, library.herdling_read.restype = [P, I, N], F
    library.herdling_packed_integers.argtypes = [P, P, P, I, N]
    library.herdling_route.argtypes = [P, P, P, I, I, I]
    library.herdling_packed_integers.restype = library.herdling_route.restype = None
    for name, arguments in SIGNATURES.items():
        for kind in ("f32", "bf16"):
            function = getattr(library, f"herdling_{name}_{kind}")
            function.argtypes = arguments
            function.restype = ctypes.c_int if name in TELLS else None
    return library
