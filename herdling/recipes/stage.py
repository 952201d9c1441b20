"""Training on packed examples, which `pretrain` and `sft` share: their data into rows, next token.

A recipe gives its defaults and the further names its `--data` may use; everything else is here once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from herdling import distributed
from herdling.data.loader import Loader
from herdling.data.mixture import Mixture
from herdling.data.spec import Maker, Opening, Weighted, open_sources
from herdling.model.llama import LanguageModel
from herdling.recipes.settings import Stage
from herdling.recipes.training import Run
from herdling.train.loop import Every
from herdling.train.losses import next_token
from herdling.train.state import State

DATA_EVERY = 50
"""Steps between two lines about the data in metrics.jsonl."""


def run(
    stage: Stage,
    name: str,
    makers: Mapping[str, Maker],
    hooks: Sequence[Every] = (),
    choose: Callable[[Run, Weighted], tuple[Weighted, str]] | None = None,
) -> LanguageModel:
    """Train, save OUT/model, return the model. Stopped runs resume exactly with `resume`.

    `choose` puts others in place of the opened sources, and says in words which.
    """
    run = Run(stage, name)
    opening = Opening(
        run.tok, stage.split, stage.seed, stage.length, run.processor, stage.encoding_errors
    )
    sources, note = open_sources(stage.data, opening, makers), ""
    if choose is not None:
        sources, note = choose(run, sources)
    with closing(load(run, sources, stage.length, stage.rows)) as loader:
        watch = Every(DATA_EVERY, lambda state: _log_data(state, loader))
        run.fit(loader, next_token, hooks=[watch, *hooks])
    return run.save(data=[source.name for source, _ in sources], note=note)


def load(run: Run, sources: Weighted, length: int, rows: int) -> Loader:
    """Rows of the sources' examples for this process, to be closed after use."""
    return Loader(
        Mixture(sources, rank=distributed.rank(), world=distributed.world_size()),
        length=length,
        batch_size=rows,
        pad=run.tok.pad,
        seed=run.config.seed,
        prefetch=True,
    )


def _log_data(state: State, loader: Loader) -> None:
    """How full the rows were so far, how many examples were left out, each source's share."""
    numbers = loader.numbers()
    del numbers["tokens"]  # the loop's own line has them
    state.metrics.log(state.step, **numbers)
