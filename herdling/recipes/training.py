"""What every training recipe shares, whatever it trains on: a model in, one call of the loop, a model out.

    run = Run(config, "dpo")                        # opens the model, attaches --lora
    run.fit(batches, loss, hooks=[Every(...)])      # trains; resumes exactly with --resume
    run.save(data=["preferences"])                  # OUT/model, and OUT/adapter with --lora

    RUN/config.yaml      the resolved settings     RUN/metrics.jsonl   loss, loads, held-out figures
    RUN/checkpoints/     for --resume              RUN/model/          the result, a model folder
    RUN/adapter/         with --lora: the adapter alone, which is merged in model/
    RUN/quantized/       with --qat: the codes that were trained with, for adapter/ if there is one;
                         model/ then holds the float weights below them, to train on

A recipe adds its batches, its loss and its hooks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from herdling import config as settings
from herdling import distributed, lora
from herdling.checkpoint import Card, save_model
from herdling.checkpoint.card import NOTICE
from herdling.checkpoint.quantized import check_stored
from herdling.checkpoint.save import check_target
from herdling.inputs.image_processor import ImageProcessor
from herdling.inputs.tokenizer import Tokenizer
from herdling.model.llama import LanguageModel
from herdling.optim import adamw
from herdling.quant import low_precision, qat
from herdling.quant.schemes import scheme
from herdling.quant.swap import restore, swap
from herdling.recipes.settings import Training
from herdling.recipes.start import Start, is_preset, start
from herdling.train import rng
from herdling.train.compression import Compression
from herdling.train.health import Routing
from herdling.train.loop import Batches, Every, Loss, fit, make_accelerator
from herdling.train.loss_scale import LossScale
from herdling.train.losses import Batch, target_tokens
from herdling.train.precision import LOW
from herdling.train.state import State


def identity(config: Training) -> dict[str, Any]:
    """The settings that a resumed run must share with its beginning: all but where and when.

    Folders may have moved: the weights come from the checkpoint, and a loader that reads other tokens
    than before says so itself.
    """
    anywhere = {"out", "resume", "tokenizer", *(() if is_preset(config.model) else ("model",))}
    return {
        name: value
        for name, value in settings.flat(config).items()
        if name not in anywhere and not name.startswith("checkpoint.")
    }


class Run:
    """One training run from its start to its model folder; see the head of this file.

    `prepare` changes the opened model before an adapter is attached to it (weights in four bits, say).
    Raises ConfigError where OUT holds a run that this one may not go on, before anything is touched.
    """

    def __init__(
        self,
        config: Training,
        name: str,
        *,
        prepare: Callable[[LanguageModel], object] | None = None,
    ) -> None:
        self.config, self.name = config, name
        self.state = State(  # first: a run that may not go on touches nothing
            config.out,
            resume=config.resume,
            title=name,
            config=config.checkpoint,
            identity=identity(config),
        )
        check_target(config.out / "model")  # before the work, not after it
        rng.seed(config.seed)
        self.accelerator = make_accelerator(config.precision, config.accumulation)
        begun = self._start()
        self.model: LanguageModel = begun.model
        self.tok: Tokenizer = begun.tok
        self.processor: ImageProcessor | None = begun.processor
        """None for a model without vision."""
        self.card: Card = begun.card
        self.hub = begun.hub
        if config.quantize is not None:
            self._say(swap(self.model, scheme(config.quantize)))
        if config.qat is not None:
            check_target(config.out / "quantized")
            kind = scheme(config.qat)
            found = qat.prepare(self.model, kind, ends=True)
            check_stored(found, kind, self.model.config, next(self.model.parameters()).dtype)
        if prepare is not None:
            prepare(self.model)
        self.adapted = config.lora is not None or config.adapter is not None
        if self.adapted:
            lora.check_target(config.out / "adapter")
            if config.lora is not None:
                lora.attach(self.model, lora.LoraConfig.parse(config.lora), seed=config.seed)
            elif config.adapter is not None:
                lora.load(self.model, config.adapter, "adapter", trainable=True)
                self.model.requires_grad_(True)
            self._say(lora.table(self.model))

    def _start(self) -> Start:
        config = self.config
        return start(
            config.model,
            config.tokenizer,
            name=config.out.name,
            vision=config.vision,
            seed=config.seed,
        )

    def average_with_start(self, share: float) -> None:
        """Put `share` of the weights that the run began with in the place of as much of its own.

        Interpolation towards the start, as in WARP (arXiv 2406.16768). Plain weights only.
        """
        with torch.no_grad():
            for own, before in zip(
                self.model.parameters(), self._start().model.parameters(), strict=True
            ):
                own.lerp_(before.to(own), share)

    def _say(self, table: object) -> None:
        if distributed.is_main():
            print(table)

    def fit(
        self,
        batches: Batches,
        loss: Loss,
        *,
        hooks: Sequence[Every] = (),
        weight: Callable[[Batch], float] = target_tokens,
    ) -> State:
        """Train on `batches` as `train.loop.fit` does; the state holds step, tokens and metrics."""
        config = self.config
        optimizer = adamw.build(self.model, config.optimizer)
        if self.adapted:
            lora.spare_idle_experts(optimizer, self.model)
        if distributed.is_main():
            settings.save(config, config.out / "config.yaml")
        with self._few_bits():
            return fit(
                self.model,
                optimizer,
                batches,
                loss,
                schedule=config.schedule,
                steps=config.steps,
                hooks=hooks,
                accelerator=self.accelerator,
                state=self.state,
                routing=Routing(self.model, config.routing),
                weight=weight,
                loss_scale=LossScale() if config.precision == "fp16" else None,
                compression=None
                if config.gradient_bits == 32
                else Compression(config.gradient_bits),
            )

    @contextmanager
    def _few_bits(self) -> Iterator[None]:
        if self.config.precision in LOW:
            low_precision.apply(self.model, self.config.precision)
        try:
            yield
        finally:
            low_precision.remove(self.model)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """In here the model computes as in a step of training, which is to be compared with it."""
        half = self.config.precision == "fp16"
        cast = LossScale().autocast if half else lambda _: self.accelerator.autocast()
        with self._few_bits(), cast(self.accelerator.device):
            yield

    def save(self, data: Sequence[str], note: str = "") -> LanguageModel:
        """Write OUT/model (an adapter merged) and OUT/adapter; `data` and `note` go into the card."""
        config, out = self.config, self.config.out
        notes = [f"{self.state.step} steps, {self.state.tokens} tokens"]
        notes += [note] if note else []
        adapter = "LoRA {} merged" if config.qat is None else "LoRA {}"
        for name, how in (("lora", adapter), ("quantize", "over {}"), ("qat", "rounded to {}")):
            if (value := getattr(config, name)) is not None:
                notes.append(how.format(value))
        card = self.card.after(
            self.name,
            name=out.resolve().name,
            source=config.model,
            data=list(data),
            hub=self.hub,
            note=", ".join(notes),
        )
        if self.adapted and distributed.is_main():
            self._save_adapter(card)
        if (
            config.qat is not None
        ):  # to add the adapter to weights that are then rounded would undo it
            lora.detach(self.model)
            with qat.removed(self.model):
                self._write(out / "model", card)
            self._say(qat.convert(self.model))
            self._write(out / "quantized", card)
        else:
            if self.adapted:
                lora.merge(self.model, plain=restore if config.quantize is not None else None)
            self._write(out / "model", card)
        return self.model

    def _write(self, folder: Path, card: Card) -> None:
        if distributed.is_main():
            save_model(self.model, self.model.config, folder, self.tok, self.processor, card=card)
            print(f"{folder}: trained on {self.state.tokens:,} tokens")

    def _save_adapter(self, card: Card) -> None:
        base, duties = self.config.model, card.duties()
        how = f"Trained by `herdling {self.name}`, {self.state.step} steps."
        about = lora.readme(
            self.model, card.title, base, how=how, on_hub=bool(self.hub), duties=duties
        )
        files = {"README.md": about} | ({"NOTICE": NOTICE + "\n"} if duties else {})
        lora.save(self.model, self.config.out / "adapter", base=base, files=files)
