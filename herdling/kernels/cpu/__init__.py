"""Products of a few rows with large weights, at the speed of memory: what decoding on a CPU is made of.

    from herdling.kernels import cpu
    if cpu.available():
        y = cpu.linear(x, layer.weight)              # nn.Linear, M = 1 .. 32 rows
        y = cpu.swiglu(x, gate, up, down)            # a dense MLP or the shared expert, one call
        y = cpu.experts(x, chosen, gates, gate_up, down)   # routed experts, one call

bfloat16 and float32, contiguous weights on the CPU, no gradients; anything else is an InputError, never
a slow or wrong result. Sums are float32; a row's result depends neither on the rows beside it nor on
the number of threads. 8- and 4-bit weights with int8 activations: `packed.py`. Written in C++, compiled
at first use (`build.py`); without a compiler `available()` is False and callers keep to torch. Under
torch.compile the same calls are custom ops (`ops.py`). Left out: training, many rows (torch's GEMMs
win there), other devices.
"""

from herdling.kernels.cpu import ops as ops  # registers the custom ops
from herdling.kernels.cpu.dense import experts, linear, rms_norm, swiglu
from herdling.kernels.cpu.library import loaded
from herdling.kernels.cpu.threads import alone

__all__ = ["alone", "available", "experts", "features", "linear", "rms_norm", "swiglu"]


def available() -> bool:
    """Whether native kernels work here; the first call compiles them (some seconds, once a machine)."""
    return loaded() is not None


def features() -> str:
    """The instruction sets in use, float and integer, or `off`: for reports."""
    library = loaded()
    if library is None:
        return "off"
    return f"{library.herdling_features().decode()}, {library.herdling_integer_features().decode()}"
