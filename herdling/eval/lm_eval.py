"""A model folder for EleutherAI's lm-eval, without a server between them (extra `eval`).

    python -m herdling.eval.lm_eval run --model herdling --model_args path=runs/demo/model \
        --tasks my_task --include_path my_tasks/

or `lm_eval.simple_evaluate(Herdling("runs/demo/model"), tasks=[...])`. Whatever follows the module's name
goes to lm-eval's own command line. The numbers are those of its `local-completions` against `herdling
serve`, and requests share the engine's batches and caches.

Begin_of_text is put before every prompt, as in training; `local-completions` with the server's tokenizer
does not, and `add_bos_token=False` makes the two comparable. Left out: pictures.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

# lm-eval is in no environment that checks types: it brings a hundred packages.
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from herdling.errors import ConfigError, InputError
from herdling.infer.lm import LM, SAMPLING, Options, load
from herdling.infer.request import Completion

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks may spell the most new tokens."""


@register_model("herdling")
class Herdling(TemplateLM):
    """lm-eval's `LM` over the engine of a loaded model."""

    def __init__(
        self,
        path: str | LM,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = True,
    ) -> None:
        """`max_length`: longest prompt with its reply; longer prompts lose their beginning. None: the
        model's context. `batch_size` requests are in the engine at once; `max_batch_size` has no meaning.

        Raises ConfigError for sizes that make no sense, and what `herdling.load` raises.
        """
        super().__init__()
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # what lm-eval's command line says where nobody asked for a device
        self.lm = path if isinstance(path, LM) else load(path, dtype, device)
        context = self.lm.config.text.max_position_embeddings
        self.max_length = context if max_length is None else int(max_length)
        if not 2 <= self.max_length <= context:
            raise ConfigError(
                f"max_length is {self.max_length}; it must be 2 to {context}, the model's context"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number from 1")
        self.batch_size = int(batch_size)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        names = sorted(self.lm.tokenizer.specials, key=len, reverse=True)
        self._controls = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self.lm.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text whose first token is scored."""
        return self.lm.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return (
            f"herdling-{len(self.lm.tokenizer)}-{'' if self.lm.card is None else self.lm.card.name}"
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids; names of control tokens stand for these, since chat templates come as text."""
        tok = self.lm.tokenizer
        ids: list[int] = []
        for i, part in enumerate(self._controls.split(string)):
            ids += [tok.specials[part]] if i % 2 else tok.encode(part)
        wanted = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [tok.bos, *ids] if wanted and ids[:1] != [tok.bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt its last message goes on."""
        tok = self.lm.tokenizer
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        open_end = "" if add_generation_prompt else chat_history[-1]["content"]
        controls = {id: name for name, id in tok.specials.items()}
        pieces: list[str] = []
        text: list[int] = []
        for id in self.lm.render(turns).ids:
            if id in controls:
                pieces += [tok.decode(text), controls[id]]
                text = []
            else:
                text.append(id)
        return "".join(pieces) + tok.decode(text) + open_end

    # ---- the three requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-prob of each continuation in nats, and whether each of its tokens is the likeliest."""
        prompts, scored = [], []
        for _, context, continuation in requests:
            if len(continuation) >= self.max_length:
                raise InputError(
                    f"a continuation has {len(continuation)} tokens; with one before it that is more "
                    f"than max_length, {self.max_length}"
                )
            prompts.append([*context, *continuation][-self.max_length :])
            scored.append(len(continuation))
        asked: Options = {"max_tokens": 0, "prompt_logprobs": 1}
        found = self._run(prompts, [asked] * len(prompts))
        return [_score(reply, count) for reply, count in zip(found, scored, strict=True)]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-prob of whole texts in nats, in windows that share no scored token."""
        rows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            for window in windows:
                rows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(rows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies up to the first stop string; greedy unless the task samples."""
        prompts: list[list[int]] = []
        settings: list[Options] = []
        for request in requests:
            context, given = request.args[:2]
            options = read_settings(given, self.max_gen_toks)
            room = self.max_length - options.get("max_tokens", 0)
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks is {options.get('max_tokens')}; max_length is {self.max_length}, "
                    "which leaves no room for a prompt"
                )
            prompts.append(self.tok_encode(context)[-room:])
            settings.append(options)
        return [reply.text for reply in self._run(prompts, settings)]

    def _run(self, prompts: Sequence[list[int]], settings: Sequence[Options]) -> list[Completion]:
        requests = [
            self.lm.request(prompt, **options)
            for prompt, options in zip(prompts, settings, strict=True)
        ]
        done: list[Completion] = []
        for start in range(0, len(requests), self.batch_size):
            done += self.lm.engine.run(requests[start : start + self.batch_size])
        return done


def _score(reply: Completion, count: int) -> tuple[float, bool]:
    """Of the last `count` tokens of a prompt."""
    tokens = (
        [token for token in (reply.prompt or [])[-count:] if token is not None] if count else []
    )
    # By value, not by id: of two equally likely tokens either is a greedy choice.
    greedy = all(token.logprob >= token.top[0][1] for token in tokens)
    return sum(token.logprob for token in tokens), greedy


def read_settings(given: dict[str, Any], max_gen_toks: int) -> Options:
    """A task's `generation_kwargs`. Raises ConfigError for one that has no meaning here."""
    rest = dict(given)
    until = rest.pop("until", None) or []
    stop = [until] if isinstance(until, str) else list(until)
    lengths = [rest.pop(name) for name in LENGTHS if name in rest]
    sampled = rest.pop("do_sample", None)
    options: Options = {
        "stop": [text for text in stop if text],
        "max_tokens": int(lengths[0]) if lengths else max_gen_toks,
    }
    unknown = rest.keys() - {*SAMPLING, "seed"}
    if unknown:
        raise ConfigError(
            f"generation_kwargs has {min(unknown)!r}; known are until, do_sample, seed, "
            + ", ".join((*LENGTHS, *SAMPLING))
        )
    if sampled is False:
        rest["temperature"] = 0.0
    elif sampled:
        rest.setdefault("temperature", 1.0)
    options.update(rest)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return options


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.exit(cli_evaluate())
