"""The one training loop. A stage is another batch source, another loss, other hooks; never a copy.

One optimizer step: take the micro-batches, count what they weigh over all processes, run them
forward and backward, clip, check that all is finite, update, write the metrics, perhaps save, then
run the hooks. Hooks come after the save, and a run that resumes at a checkpoint runs that step's
hooks again, so that an evaluation is never lost and never a reason to lose the step.

Left out on purpose: sharded models, and shrinking a batch that does not fit in memory.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from herdling import distributed
from herdling.errors import DataError
from herdling.metrics import Progress, short
from herdling.train.compression import Compression
from herdling.train.guard import NotFinite, blame, keep_batches
from herdling.train.health import Routing
from herdling.train.loss_scale import LossScale
from herdling.train.losses import Batch, Numbers, routed_tokens, target_tokens
from herdling.train.precision import Precision
from herdling.train.signals import Stopped, StopSignals
from herdling.train.state import State, Stateful

Loss = Callable[[nn.Module, Batch], tuple[Tensor, Numbers]]


class Batches(Stateful, Protocol):
    """Micro-batches of this process, without end, that can tell and restore their place.

    After n items, `state_dict` is the place from which iteration gives item n + 1.
    """

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Every:
    """Call `do(state)` after every `n` optimizer steps, and after the last one if `at_end`."""

    n: int
    do: Callable[[State], Any]
    at_end: bool = True

    def due(self, step: int, steps: int) -> bool:
        return step > 0 and (step % self.n == 0 or (self.at_end and step == steps))


def make_accelerator(
    precision: Precision = "fp32",
    accumulation: int = 1,
    *,
    cpu: bool = False,
) -> Accelerator:
    """accelerate's handle on device, precision and processes; `accumulation` micro-batches a step.

    The device is CUDA's, else the CPU: never MPS, which accelerate would take and which has no float64.
    The weights stay as they are built (float32); bf16 means autocast, as do precisions below it, which
    `quant.low_precision` applies to single layers. fp16 leaves autocast and scale to
    `fit(loss_scale=...)`, because accelerate's own are not in our checkpoints.
    """
    return Accelerator(
        mixed_precision="no" if precision in ("fp32", "fp16") else "bf16",
        gradient_accumulation_steps=accumulation,
        cpu=cpu or not torch.cuda.is_available(),
        # A batch without a picture leaves the vision encoder without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: Loss,
    *,
    schedule: Callable[[int, int], float],
    steps: int,
    hooks: Sequence[Every] = (),
    accelerator: Accelerator,
    state: State,
    routing: Routing | None = None,
    weight: Callable[[Batch], float] = target_tokens,
    clip: float = 1.0,
    loss_scale: LossScale | None = None,
    compression: Compression | None = None,
) -> State:
    """Train `model` in place until `steps` optimizer steps are done; return `state`.

    loss: gives sums over a micro-batch; the step's loss is their total over micro-batches and
        processes, divided by the total `weight`. Where a model has routers, `routing` (default:
        `Routing(model)`) adds its balancing term, whatever the loss.
    schedule: (step, steps) -> factor on each group's own learning rate.
    clip: largest norm of the whole gradient; 0 for no clipping.
    loss_scale: train in float16 with this scale; a step whose gradient overflows is skipped.
    compression: how gradients are coded between processes; without it they are sent as they are.

    Raises NotFinite before the weights change when loss or gradient is not finite, Stopped after
    saving on Ctrl-C or SIGTERM, DataError when the batches end early or have nothing to learn.
    """
    trainer = _Trainer(model, optimizer, batches, loss, schedule, steps, accelerator, state,
                       routing or Routing(model), weight, clip, loss_scale, compression)  # fmt: skip
    with trainer.routing, StopSignals() as stop, trainer.progress:
        try:
            trainer.begin()
            trainer.run(hooks, stop)
        finally:
            trainer.end()
    return state


class _Trainer:
    """The parts of one call of `fit`, so that each phase of a step is a function of its own."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        loss: Loss,
        schedule: Callable[[int, int], float],
        steps: int,
        accelerator: Accelerator,
        state: State,
        routing: Routing,
        weight: Callable[[Batch], float],
        clip: float,
        loss_scale: LossScale | None,
        compression: Compression | None,
    ) -> None:
        self.model, self.optimizer, self.batches, self.loss = model, optimizer, batches, loss
        self.schedule, self.steps, self.accelerator = schedule, steps, accelerator
        self.state, self.routing, self.weight, self.clip = state, routing, weight, clip
        self.device = accelerator.device
        self.own_forward = vars(model).get("forward")
        self.loss_scale, self.compression = loss_scale, compression
        self.parts: dict[str, Stateful] = {"batches": batches, "routing": routing}
        if loss_scale is not None:
            self.parts["loss_scale"] = loss_scale
        if compression is not None:
            self.parts["compression"] = compression
        self.progress = Progress(
            state.title, steps, state.step, show=state.show and distributed.is_main()
        )
        self.accumulation = accelerator.gradient_accumulation_steps
        state.identity.setdefault("accumulation", self.accumulation)

    def begin(self) -> None:
        # First the device, so that restored optimizer states land where their weights are.
        self.model.to(self.device)
        for line in self.state.begin(self.model, self.optimizer, self.parts):
            self.progress.note(line)
        self.progress.restart(self.state.step)
        self.wrapped, self.stepper = self.accelerator.prepare(
            self.model, self.optimizer, device_placement=[True, False]
        )
        if self.compression is not None and distributed.active():
            self.wrapped.register_comm_hook(None, self.compression.hook)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.zero_grad()

    def end(self) -> None:
        # accelerate hangs a wrapped forward on a mixed-precision model: give the caller its own back.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.own_forward is None:
            vars(self.model).pop("forward", None)
        self.accelerator.free_memory()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])

    def run(self, hooks: Sequence[Every], stop: StopSignals) -> None:
        stream: Iterator[Batch] = iter(self.batches)
        state = self.state
        while True:
            self._stop_if_asked(stop)
            for hook in hooks:
                if hook.due(state.step, self.steps):
                    hook.do(state)
                    self._stop_if_asked(stop)
            if state.step >= self.steps:
                return
            self.model.train()
            self._step(self._take(stream))
            if state.step % state.config.every == 0 or state.step == self.steps:
                state.save(self.model, self.optimizer, self.parts)

    def _stop_if_asked(self, stop: StopSignals) -> None:
        number = stop.agreed()
        if number:
            path = self.state.save(self.model, self.optimizer, self.parts)
            raise Stopped(f"stopped after step {self.state.step}, saved in {path}", number)

    def _take(self, stream: Iterator[Batch]) -> list[Batch]:
        micro: list[Batch] = []
        while len(micro) < self.accumulation:
            try:
                micro.append(next(stream))
            except StopIteration:
                raise DataError(
                    f"the batches ended at step {self.state.step} of {self.steps}; "
                    "remedy: fewer --steps, or a source that repeats"
                ) from None
        return micro

    def _step(self, micro: list[Batch]) -> None:
        state, started = self.state, time.perf_counter()
        weight, tokens = self._weigh(micro)
        factor = self.schedule(state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        sums = _Sums()
        for i, batch in enumerate(micro):
            last = i == len(micro) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                self._backward(self._on_device(batch), weight, tokens, sums)
        if self.loss_scale is not None:
            self.loss_scale.unscale(self.parameters)
        bound = self.clip if self.clip > 0 else math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.parameters, bound) or 0.0)
        means = sums.means(weight)
        finite = math.isfinite(norm) and math.isfinite(means["loss"])
        if not finite and not self._overflowed(means["loss"]):
            self._fail(micro, means["loss"], norm)
        if finite:
            self.stepper.step()
            # torch's fused optimizers write without counting it, and an engine that shares the
            # weights looks at the count to see that what it keeps of them is void.
            torch.autograd.graph.increment_version(self.parameters)
            means["grad_norm"] = norm
        if self.loss_scale is not None:
            means["loss_scale"] = before = self.loss_scale.scale
            self.loss_scale.update(finite)
            if self.compression is not None:
                self.compression.rescale(self.loss_scale.scale / before)
        self.stepper.zero_grad()
        state.step += 1
        state.tokens += int(tokens)
        numbers, warnings = self.routing.finish()
        peak = max(group["lr"] for group in self.optimizer.param_groups)
        state.metrics.log(state.step, **means, lr=peak, tokens=state.tokens, **numbers)
        for line in warnings:
            state.metrics.log(state.step, warning=line)
            self.progress.note(f"step {state.step}: warning: {line}")
        self._show(means["loss"], tokens / (time.perf_counter() - started))

    def _weigh(self, micro: list[Batch]) -> tuple[float, float]:
        """Total weight and tokens of the step, over its micro-batches and all processes."""
        own = [sum(float(count(b)) for b in micro) for count in (self.weight, routed_tokens)]
        weight, tokens = distributed.total(
            torch.tensor(own, dtype=torch.float64, device=_wide(self.device))
        ).tolist()
        if not weight > 0:
            raise DataError(
                f"step {self.state.step + 1}: no token of the whole batch is to be learnt; "
                "remedy: check the loss masks (labels are all -100)"
            )
        return weight, tokens

    def _overflowed(self, loss: float) -> bool:
        """Whether a smaller loss scale may be all that a step lacks: it is skipped then, not failed."""
        scale = self.loss_scale
        return scale is not None and math.isfinite(loss) and scale.scale > 1

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.loss_scale is None else self.loss_scale.autocast(self.device)

    def _on_device(self, batch: Batch) -> Batch:
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def _backward(self, batch: Batch, weight: float, tokens: float, sums: "_Sums") -> None:
        with self.routing.recording(batch.get("documents")), self._precision():
            value, numbers = self.loss(self.wrapped, batch)
        sums.add("loss", value)
        for name, number in numbers.items():
            sums.add(name, number)
        objective = value / weight
        balance = self.routing.term()
        if balance is not None:
            own = routed_tokens(batch)
            sums.add("balance", (balance.detach() * own / len(self.routing.routers), own))
            if self.routing.config.balance > 0:
                objective = objective + self.routing.config.balance * balance * (own / tokens)
        # accelerate divides by the micro-batches and DDP by the processes; `weight` has them already.
        factor = self.accumulation * distributed.world_size()
        if self.loss_scale is not None:
            factor *= self.loss_scale.scale
        self.accelerator.backward(objective * factor)

    def _fail(self, micro: list[Batch], loss: float, norm: float) -> None:
        state = self.state
        folder = state.folder / f"not-finite-step-{state.step + 1}"
        name = f"{folder}/rank-{distributed.rank()}" if distributed.active() else str(folder)
        keep_batches(type(folder)(name), micro)
        with self._precision():
            what = blame(self.model, [self._on_device(b) for b in micro], self.loss)
        path = self.state.checkpoints.latest()
        raise NotFinite(
            f"step {state.step + 1}: loss {loss}, gradient norm {norm}; first not finite: {what}; "
            f"batch kept in {name}; last good checkpoint: {path or 'none'}; "
            "remedy: look at the batch, or lower the learning rate"
        )

    def _show(self, loss: float, pace: float) -> None:
        state = self.state
        words = (f"loss {loss:.4f}", state.aside, f"{short(pace)} tok/s", self.routing.line())
        self.progress.update(state.step, "  ".join(filter(None, words)))
        memory = {}
        if self.device.type == "cuda":
            memory["memory"] = torch.cuda.max_memory_allocated(self.device)
        state.metrics.timing(state.step, time=time.time(), tokens_per_second=pace, **memory)


class _Sums:
    """Sums over the micro-batches of a step; read once, so that the device waits once."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.weights: dict[str, list[Tensor | float]] = {}

    def add(self, name: str, number: Tensor | tuple[Tensor, Tensor | float]) -> None:
        if isinstance(number, tuple):
            number, weight = number
            self.weights.setdefault(name, []).append(weight)
        self.values.setdefault(name, []).append(number.detach())

    def means(self, weight: float) -> dict[str, float]:
        """Each sum over all processes, divided by its own weight or by that of the batch."""
        names = list(self.values)
        device = self.values["loss"][0].device
        rows = [_add(self.values[n], device) for n in names]
        rows += [_add(self.weights.get(n, []), device) for n in names]
        totals = distributed.total(torch.stack(rows)).tolist()
        values, weights = totals[: len(names)], totals[len(names) :]
        return {
            name: value / ((own or 1.0) if name in self.weights else weight)
            for name, value, own in zip(names, values, weights, strict=True)
        }


def _wide(device: torch.device) -> torch.device:
    """Where float64 sums are made: MPS has none."""
    return torch.device("cpu") if device.type == "mps" else device


def _add(values: Iterable[Tensor | float], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=_wide(device))
    for value in values:
        total = total + torch.as_tensor(value).to(total)
    return total
