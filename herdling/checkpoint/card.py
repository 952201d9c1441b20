"""The model card: where the weights came from, on what data, and what the licence then asks.

The lineage lives in the metadata block of README.md under `herdling`, so it survives load -> train
-> save as long as each stage writes `Card.open(folder).after(...)`. Licence facts: Meta's Llama 4
Community License, section 1.b, and its Acceptable Use Policy (llama-models `llama4/`). The checks
here help; they are no legal advice.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult

from herdling import __version__
from herdling.errors import CheckpointError
from herdling.model.config import ModelConfig, preset

Touch = Literal["", "weights", "outputs"]

NOTICE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright \u00a9 Meta Platforms, Inc. "
    "All Rights Reserved."
)
LICENCE_URL = "https://www.llama.com/llama4/license/"
_POLICY_URL = "https://www.llama.com/llama4/use-policy/"
_EU_CLAUSE = (
    "The Llama 4 Acceptable Use Policy does not grant the rights to the multimodal models to "
    "individuals domiciled in, or companies with a principal place of business in, the European "
    "Union; end users of a product or service that incorporates such a model are not affected."
)


@dataclass(frozen=True)
class Step:
    """One thing that was done to the weights."""

    stage: str
    """What: "pretrain", "sft", "import-meta", ..."""
    source: str = ""
    """What went in besides the weights so far: a hub name, a folder, a teacher."""
    data: tuple[str, ...] = ()
    note: str = ""
    llama: Touch = ""
    """Whether Meta's Llama weights, or outputs of a Llama model, entered in this step."""
    hub: tuple[str, ...] = ()
    """Those of `source` and `data` that came from the hub. No other name is published as one: a
    folder `runs/base`, or built-in data `picture/scene`, only looks like it."""


@dataclass(frozen=True)
class Card:
    """A model's name, history, licence and results; becomes README.md of its folder."""

    name: str
    steps: tuple[Step, ...] = ()
    license: str | None = None
    """Of weights that owe nothing to Llama (an SPDX name); with Llama in them it is Meta's."""
    results: dict[str, float] = field(default_factory=dict)
    """Task -> accuracy."""

    def after(
        self,
        stage: str,
        *,
        name: str | None = None,
        source: str = "",
        data: Iterable[str] = (),
        note: str = "",
        llama: Touch = "",
        hub: Iterable[str] = (),
    ) -> "Card":
        """The card after one more step. Results are of other weights then, so they are dropped."""
        step = Step(stage, source, tuple(data), note, llama, tuple(hub))
        return replace(self, name=name or self.name, steps=(*self.steps, step), results={})

    @property
    def llama(self) -> bool:
        """Whether the Llama licence reaches these weights."""
        return any(step.llama for step in self.steps)

    @property
    def title(self) -> str:
        """The name to publish under: the licence wants "Llama" at its beginning."""
        return f"Llama-{self.name}" if self.llama and not _starts_llama(self.name) else self.name

    def duties(self) -> str | None:
        """What a user of these weights has to do, in one line; None without Llama in them."""
        if not self.llama:
            return None
        return (
            'made with Llama 4: its licence asks for "Built with Llama" in sight, a name beginning '
            'with "Llama", the NOTICE file and a copy of the licence '
            f"({LICENCE_URL}); multimodal rights are not granted in the EU"
        )

    @classmethod
    def open(cls, folder: Path | str, config: ModelConfig) -> "Card":
        """The card of a folder; of a foreign or missing one, what can be told about its origin."""
        folder = Path(folder)
        name = folder.resolve().name
        return cls.recorded(folder) or _foreign(name, _metadata(folder), config)

    @classmethod
    def recorded(cls, folder: Path | str) -> "Card | None":
        """The card that Herdling once wrote into a folder, or None."""
        folder = Path(folder)
        own = _metadata(folder).get("herdling")
        if own is None:
            return None
        try:
            steps = tuple(_step(raw) for raw in own["lineage"])
            return cls(own["name"], steps, own.get("license"), dict(own.get("results", {})))
        except (AttributeError, KeyError, TypeError) as problem:
            raise CheckpointError(
                f"{folder / 'README.md'}: herdling metadata is broken: {problem!r}"
            ) from problem

    def save(self, folder: Path | str, config: ModelConfig) -> None:
        """Write README.md, and NOTICE where the licence asks for it."""
        folder = Path(folder)
        ModelCard(f"---\n{self._data(config).to_yaml()}\n---\n\n{self._body(config)}").save(
            folder / "README.md"
        )
        if self.llama:
            (folder / "NOTICE").write_text(NOTICE + "\n", "utf-8")

    def _data(self, config: ModelConfig) -> ModelCardData:
        licence: dict[str, Any] = {"license": self.license}
        if self.llama:
            licence = dict(license="other", license_name="llama4", license_link=LICENCE_URL)
        bases = [s.source for s in self.steps if s.llama != "outputs" and s.source in s.hub]
        data = [name for step in self.steps for name in step.data if name in step.hub]
        own = {"name": self.name, "lineage": [_plain(step) for step in self.steps]}
        if self.license:
            own["license"] = self.license
        if self.results:
            own["results"] = self.results
        return ModelCardData(
            **licence,
            base_model=list(dict.fromkeys(bases)) or None,
            datasets=list(dict.fromkeys(data)) or None,
            library_name="transformers",
            pipeline_tag="image-text-to-text" if config.vision else "text-generation",
            tags=["llama4", "herdling", "mixture-of-experts"],
            model_name=self.title,
            eval_results=[
                # A type of its own for each task: results of one type are merged by the hub.
                EvalResult("text-generation", f"herdling/{task}", task, "accuracy", value)
                for task, value in self.results.items()
            ]
            or None,
            herdling=own,
        )

    def _body(self, config: ModelConfig) -> str:
        kind = "multimodal" if config.vision else "text"
        parts = [
            f"# {self.title}",
            f"A {kind} model of the Llama 4 architecture ({config.text.num_hidden_layers} layers, "
            f"{config.text.num_local_experts} experts), saved by Herdling {__version__} in transformers' format.",
        ]
        if self.llama:
            parts += ["**Built with Llama**", "## Licence", *self._licence(config)]
        parts += ["## Lineage", "\n".join(_line(i, s) for i, s in enumerate(self.steps, 1)) or "None recorded."]  # fmt: skip
        if self.results:
            rows = [f"| {task} | {value:.3f} |" for task, value in self.results.items()]
            parts += ["## Results", "\n".join(["| task | accuracy |", "| --- | --- |", *rows])]
        return "\n\n".join(parts) + "\n"

    def _licence(self, config: ModelConfig) -> list[str]:
        how = sorted({step.llama for step in self.steps if step.llama})
        clauses = [
            f"Llama 4 {' and '.join(how)} went into this model. Whoever distributes it must ship a "
            f"copy of the [Llama 4 Community License]({LICENCE_URL}) and the NOTICE file, show "
            '"Built with Llama", keep "Llama" at the beginning of the name, and follow the '
            f"[Acceptable Use Policy]({_POLICY_URL}).",
            NOTICE,
        ]
        return [*clauses, _EU_CLAUSE] if config.vision else clauses


def _metadata(folder: Path) -> dict[str, Any]:
    """The metadata block of a folder's README.md; empty without one."""
    file = folder / "README.md"
    if not file.exists():
        return {}
    try:
        return ModelCard.load(file).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as problem:
        raise CheckpointError(f"{file}: metadata block is broken: {problem}") from problem


def _starts_llama(name: str) -> bool:
    return name.split("/")[-1].startswith("Llama")


def _plain(step: Step) -> dict[str, Any]:
    """A step as YAML keeps it: no empty fields."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(step).items()
        if value
    }


def _step(raw: dict[str, Any]) -> Step:
    """The inverse of `_plain`; TypeError for what is no step."""
    lists = {key: tuple(raw.get(key, ())) for key in ("data", "hub")}
    return Step(**{**raw, **lists})


def _line(number: int, step: Step) -> str:
    words = [f"{number}. **{step.stage}**"]
    if step.source:
        words.append(f"from {step.source}")
    if step.data:
        words.append(f"on {', '.join(step.data)}")
    if step.llama:
        words.append(f"(Llama {step.llama})")
    return " ".join(words) + (f": {step.note}" if step.note else "")


def _foreign(name: str, raw: dict[str, Any], config: ModelConfig) -> Card:
    """A card for a folder that is not ours: Llama's if its own card or its exact shape says so."""
    bases = raw.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else list(bases)
    source, hub = (bases[0], (bases[0],)) if bases else (name, ())
    named = [raw.get("license"), raw.get("license_name"), raw.get("model_name"), *bases]
    if any("llama4" in str(word).lower().replace("-", "") for word in named):
        step = Step("origin", source, llama="weights", note="said by its card", hub=hub)
    elif _released_shape(config):
        step = Step(
            "origin", name, llama="weights", note="presumed: it has a release's exact shape"
        )
    else:
        step = Step("origin", source, note="not made by Herdling; no record", hub=hub)
    licence = raw.get("license")
    return Card(name, (step,), licence if isinstance(licence, str) and not step.llama else None)


def _released_shape(config: ModelConfig) -> bool:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "num_local_experts", "vocab_size")  # fmt: skip
    return any(
        all(getattr(config.text, key) == getattr(preset(name).text, key) for key in keys)
        for name in ("scout", "maverick")
    )
