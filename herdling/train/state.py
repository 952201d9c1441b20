"""The state of a run: everything that must come back for a resumed run to equal one never stopped.

    RUN/config.yaml             written by the recipe
    RUN/metrics.jsonl           what the run reproduces; timing.jsonl: what the clock decided
    RUN/checkpoints/step-N/     model.safetensors   weights under the model's own names
                                optimizer.{json,safetensors}   state by parameter name
                                state.{json,safetensors}   step, data place, random generators,
                                                    routing, how long the metrics were

No pickle anywhere. Left out on purpose: sharded checkpoints (each process holds the whole model) and
a change of the number of processes, which is refused.
"""

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from herdling import distributed
from herdling.errors import CheckpointError, ConfigError
from herdling.files import check_folder, read_json
from herdling.metrics import METRICS, Metrics
from herdling.train import rng
from herdling.train.checkpoints import Checkpoints
from herdling.train.config import CheckpointConfig
from herdling.train.tree import load_tensors, load_tree, save_tree


class Stateful(Protocol):
    """Anything with a place or memory that a checkpoint must hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class State:
    """Where a run stands, and its folder.

    `identity` holds the settings that a resumed run must share with the saved one (batch size, data,
    seed, ...): JSON values by name. A difference is an error, never a silent change of course.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        resume: bool = False,
        title: str = "train",
        config: CheckpointConfig | None = None,
        identity: dict[str, Any] | None = None,
        show: bool = True,
    ) -> None:
        self.folder, self.title, self.resume = Path(folder), title, resume
        self.show = show
        self.config = config or CheckpointConfig()
        self.identity = dict(identity or {})
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", self.config.keep, self.config.permanent
        )
        self.step = 0
        """Optimizer steps done."""
        self.tokens = 0
        """Tokens seen, over all processes, padding not counted."""
        self.aside = ""
        """What a hook wants to be shown beside the loss."""
        self.saved: int | None = None
        """The step of the checkpoint that holds this very state, if there is one."""
        check_folder(self.folder, "out")
        metrics = self.folder / METRICS
        written = metrics.exists() and metrics.stat().st_size > 0
        if not resume and (written or self.checkpoints.latest()):
            raise ConfigError(
                f"{self.folder} already holds a run; remedy: --resume, or another --out"
            )
        latest = self.checkpoints.latest() if resume else None
        if latest is not None:  # before anything is written or read for the run
            self._same(_read_identity(latest), latest, self.identity)
        self._metrics: Metrics | None = None

    @property
    def metrics(self) -> Metrics:
        """Where hooks, and a recipe after `fit`, write their numbers; there is none before `fit`."""
        assert self._metrics is not None, "state.metrics is used before fit has begun"
        return self._metrics

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Stateful]
    ) -> list[str]:
        """Take up the latest checkpoint, if this run resumes and has one; say so in words.

        Called by `fit`, not before: only then does every process know which one it is. Raises
        CheckpointError or ConfigError where the checkpoint does not fit.
        """
        self.identity["processes"] = distributed.world_size()
        self._metrics = Metrics(self.folder if distributed.is_main() else None)
        if distributed.is_main():
            self.checkpoints.sweep()
        distributed.barrier()
        path = self.checkpoints.latest() if self.resume else None
        if path is None:
            self.metrics.rewind(0, 0)
            return ["no checkpoint yet: starting at step 0"] if self.resume else []
        tree = load_tree(path, "state")
        self._same(tree["identity"], path, {**tree["identity"], **self.identity})
        ranks = tree["ranks"]
        _load_model(model, path)
        _load_optimizer(model, optimizer, load_tree(path, "optimizer"), path)
        for name, part in parts.items():
            part.load_state_dict(ranks[distributed.rank()][name])
        rng.load_state_dict(ranks[distributed.rank()]["rng"])
        self.metrics.rewind(tree["step"], tree["metrics"])
        self.step, self.tokens, self.saved = tree["step"], tree["tokens"], tree["step"]
        changed = [
            f"{name} was {tree['environment'].get(name)}, is {value}"
            for name, value in environment(model).items()
            if tree["environment"].get(name) != value
        ]
        lines = [f"resumed at step {self.step} from {path}"]
        if changed:
            lines.append(f"results may differ in the last bits: {'; '.join(changed)}")
        return lines

    def _same(self, saved: dict[str, Any], path: Path, names: Iterable[str]) -> None:
        for name in names:
            old, new = saved.get(name), self.identity.get(name)
            if old != new:
                # The learning rate of every step so far was a matter of how many there would be.
                why = ", as its schedule spans them all" if name == "steps" else ""
                raise ConfigError(
                    f"{name} is {new!r} but {path} was trained with {old!r}{why}; "
                    "remedy: the same value, or another --out"
                )

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: dict[str, Stateful]
    ) -> Path:
        """Write the checkpoint of the present step, unless it is there already; every process calls."""
        path = self.checkpoints.path(self.step)
        if self.saved == self.step:
            return path
        mine = {name: part.state_dict() for name, part in parts.items()} | {"rng": rng.state_dict()}
        ranks = distributed.gather(mine)
        if distributed.is_main():
            tree = {
                "step": self.step,
                "tokens": self.tokens,
                "identity": self.identity,
                "environment": environment(model),
                "metrics": self.metrics.place(),
                "ranks": ranks,
            }
            with self.checkpoints.write(self.step) as folder:
                weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
                save_file(weights, folder / "model.safetensors")
                save_tree(folder, "optimizer", _optimizer_state(model, optimizer))
                save_tree(folder, "state", tree)
        distributed.barrier()
        self.saved = self.step
        return path


def _read_identity(path: Path) -> dict[str, Any]:
    return read_json(path / "state.json", CheckpointError)["identity"]


def environment(model: nn.Module) -> dict[str, Any]:
    """What decides the last bits of a sum: recorded, and compared on resume."""
    device = next(model.parameters()).device
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()}


def _load_model(model: nn.Module, path: Path) -> None:
    saved, present = load_tensors(path / "model.safetensors"), model.state_dict()
    for name in [*present, *saved]:
        if name not in saved or name not in present:
            where = "the model" if name in present else "the checkpoint"
            raise CheckpointError(f"{path}: {name} is only in {where}; is this another model?")
        old, new = saved[name], present[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tuple(old.shape)} {old.dtype}, "
                f"the model has {tuple(new.shape)} {new.dtype}"
            )
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        on_device = bool(group.get("fused") or group.get("capturable"))
        for parameter in group["params"]:
            state = saved.pop(names[id(parameter)], {})
            # As torch keeps them: scalars such as the step stay on the CPU unless a fused code reads
            # them. Not through load_state_dict, which rounds the averages to the weights' type.
            optimizer.state[parameter] = {
                key: value.to(parameter.device)
                if isinstance(value, torch.Tensor) and (value.ndim or on_device)
                else value
                for key, value in state.items()
            }
            if not state:
                del optimizer.state[parameter]
    if saved:
        raise CheckpointError(
            f"{path}: the optimizer does not train {next(iter(saved))} any more; "
            "remedy: the settings the run was started with"
        )
