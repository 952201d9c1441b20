"""`herdling inspect`: what training data looks like to the model, and what of it is learned.

    herdling inspect --data 'chats/*.jsonl:3,tasks' --tokenizer runs/base/model
    herdling inspect --data builtin --tokenizer runs/tok --form document --count 2

Some examples as the loader gives them, what is to be predicted in colour (marked [+ so +] where there
are no colours), then a table: tokens of each source, how many carry loss, how full rows get.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from herdling.errors import ConfigError
from herdling.files import check_file, write_json
from herdling.recipes.chat import UNSAFE

MARKS = ("[+", "+]")
"""Around what carries loss, where there is no colour."""


@dataclass(frozen=True)
class Config:
    """Show what training data looks like, with the loss mask in colour."""

    data: str
    """What to show, with weights, as the training verbs take it."""
    tokenizer: Path
    """Folder of a tokenizer, or of a model; pictures need a model that sees, or --preset."""
    preset: Literal["nano", "tiny", "small", "base"] | None = None
    """With a bare tokenizer: the preset whose pictures to show."""
    count: int = 4
    """Examples shown."""
    measure: int = 200
    """Examples measured for the table."""
    length: int = 512
    """Tokens of a row, to tell what is cut or left out."""
    form: Literal["chat", "document"] = "chat"
    """How tasks are written: as conversations (sft) or as plain documents (pretrain)."""
    split: Literal["train", "validation", "test", "all"] = "train"
    """Which part of the data."""
    most: int = 2000
    """Most characters shown of an example."""
    seed: int = 0
    """Decides the order, as in training."""
    json: Path | None = None
    """Also write the table to this file."""


@dataclass
class Share:
    """What was measured of one source."""

    weight: float
    """Its share by the spec, 0 to 1."""
    examples: int = 0
    tokens: int = 0
    learned: int = 0
    """Tokens that carry loss."""
    pictures: int = 0
    """Tiles."""
    longest: int = 0
    over: int = 0
    """Examples longer than a row."""
    lengths: list[int] = field(default_factory=list, repr=False)


def main(config: Config) -> None:
    """Print examples and table. Raises Error for data that cannot be opened."""
    for name in ("count", "measure", "length", "most"):
        if getattr(config, name) < (0 if name == "count" else 1):
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    check_file(config.json, "json")
    from herdling.data.mixture import Mixture
    from herdling.data.packing import IGNORE, best_fit, cut
    from herdling.data.spec import Opening, open_sources
    from herdling.inputs.tokenizer import Tokenizer
    from herdling.tasks.mixture import makers

    tok = Tokenizer.open(config.tokenizer)
    opening = Opening(tok, config.split, config.seed, config.length, _processor(config))
    mixture = Mixture(open_sources(config.data, opening, makers(config.form)))
    console = Console(highlight=False, soft_wrap=True)
    shares = {name: Share(weight) for name, weight in mixture.shares.items()}
    for i in range(max(config.count, config.measure)):
        number, index, example = mixture.next()
        name = mixture.sources[number].name
        learned = sum(example.loss_mask[1:])
        if i < config.count:
            _head(console, f"{name} {index}: {len(example.tokens)} tokens, {learned} learned")
            console.print(shown(tok, example.tokens, example.loss_mask, config.most, console))
        share, size = shares[name], len(example.tokens)
        share.examples += 1
        share.tokens += size
        share.learned += learned
        share.pictures += 0 if example.tiles is None else len(example.tiles)
        share.longest = max(share.longest, size)
        share.over += size > config.length
        pieces = cut(example, config.length) or []  # as the loader takes them
        share.lengths += [len(p.tokens) for p in pieces if (p.labels != IGNORE).any()]
    lengths = [n for share in shares.values() for n in share.lengths]
    rows = len(best_fit(lengths, config.length))
    fill = sum(lengths) / (rows * config.length) if rows else 0.0
    console.print(table(shares, config.length))
    console.print(f"rows of {config.length} tokens would be {fill:.1%} full")
    if config.json is not None:
        write_json(
            config.json, {"data": config.data, "fill": round(fill, 4), "sources": plain(shares)}
        )


def _processor(config: Config) -> Any:
    """How pictures are made into tiles; None for text alone."""
    from herdling.inputs.image_processor import ImageProcessor
    from herdling.model.config import preset

    if config.preset is not None:
        vision = preset(config.preset, vision=True).vision
        return None if vision is None else ImageProcessor.from_vision_config(vision)
    known = ("preprocessor_config.json", "processor_config.json")
    sees = any((config.tokenizer / name).is_file() for name in known)
    return ImageProcessor.open(config.tokenizer) if sees else None


def shown(tok: Any, ids: Sequence[int], mask: Sequence[bool], most: int, console: Console) -> Text:
    """The text of an example, patch tokens counted, with what is learned told apart."""
    text = Text()
    for part, learned in spans(tok, ids, mask):
        room = most - len(text.plain)
        if room <= 0:
            text.append(" ...", "bold")
            break
        cut = part[:room].translate(UNSAFE) if console.is_terminal else part[:room]
        if not learned:
            text.append(cut, "dim")
        elif console.no_color or not console.is_terminal:
            text.append(f"{MARKS[0]}{cut}{MARKS[1]}")
        else:
            text.append(cut, "bold green")
    return text


def spans(tok: Any, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[str, bool]]:
    """(text, whether it carries loss) of runs of tokens; the patches of a picture are one `<|patch|> x n`.

    The loss of the first token says nothing, so it counts with what follows.
    """
    start = 0
    for end in range(1, len(ids) + 1):
        kind = (mask[start] and start > 0, ids[start] == tok.patch)
        if end < len(ids) and (mask[end], ids[end] == tok.patch) == kind:
            continue
        text = tok.decode(ids[start:end], surrogates=False)  # no terminal takes half a pair
        if kind[1]:
            text = f"{tok.decode([tok.patch])} x {end - start} "
        yield text, kind[0]
        start = end


def table(shares: dict[str, Share], length: int) -> Table:
    total = sum(share.tokens for share in shares.values())
    made = Table(box=None, pad_edge=False)
    made.add_column("source")
    for title in (
        "weight",
        "tokens",
        "examples",
        "mean",
        "longest",
        "learned",
        "tiles",
        f"> {length}",
    ):
        made.add_column(title, justify="right")
    for name, share in shares.items():
        made.add_row(
            name,
            f"{share.weight:.1%}",
            f"{share.tokens / total:.1%}",
            str(share.examples),
            f"{share.tokens / max(1, share.examples):.0f}",
            str(share.longest),
            f"{share.learned / max(1, share.tokens):.1%}",
            str(share.pictures),
            str(share.over),
        )
    return made


def plain(shares: dict[str, Share]) -> dict[str, Any]:
    """The measured numbers for a JSON file."""
    return {
        name: {key: value for key, value in vars(share).items() if key != "lengths"}
        for name, share in shares.items()
    }


def _head(console: Console, text: str) -> None:
    console.print(Text(f"--- {text}", "bold cyan"))
