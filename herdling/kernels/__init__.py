"""The operations the model is made of, each with a plain reference beside the fast form."""

import os

# Large CPU tensors in huge pages: training asks the system for hundreds of megabytes of fresh memory
# a step, and faulting it in by 4 KiB costs a fifth of the time (docs/performance.md). torch reads
# this at its first large allocation; set it to 0 to have the default back.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
