"""Adapters: low-rank changes of a model's matrices, every routed expert's included."""

from herdling.lora.adapters import Adapters, attach, detach, merge, of
from herdling.lora.config import LoraConfig
from herdling.lora.coverage import coverage, table
from herdling.lora.idle import spare_idle_experts
from herdling.lora.peft_folder import check_target, load, save
from herdling.lora.readme import readme

__all__ = [
    "Adapters",
    "LoraConfig",
    "attach",
    "check_target",
    "coverage",
    "detach",
    "load",
    "merge",
    "of",
    "readme",
    "save",
    "spare_idle_experts",
    "table",
]
