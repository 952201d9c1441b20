"""Adapters: low-rank changes of a model's matrices, every routed expert's included."""

from herdling.lora.adapters import Adapters, attach, detach, merge, of
from herdling.lora.config import LoraConfig
from herdling.lora.coverage import coverage, table
from herdling.lora.idle import spare_idle_experts
from herdling.lora.peft_folder import load, save

__all__ = [
    "Adapters",
    "LoraConfig",
    "attach",
    "coverage",
    "detach",
    "load",
    "merge",
    "of",
    "save",
    "spare_idle_experts",
    "table",
]
