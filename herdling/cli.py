"""The `herdling` command: finds the recipe of a verb, runs it, and turns its end into a status.

    herdling VERB [PATH|PRESET] [--config run.yaml] [--flags] [--section.field value]

Status 0: done. 1: the work failed or a check fell short. 2: bad usage. 130 and 143: stopped by
Ctrl-C or SIGTERM, with the work saved where the verb can save it. A recipe is imported only when its
verb is used, so that `herdling --help` stays instant.
"""

import importlib
import os
import shlex
import sys
import warnings
from dataclasses import fields
from types import ModuleType

VERBS = {
    "demo": "Train a tiny multimodal model on built-in data, from tokenizer to report.",
    "tokenizer": "Train a byte-level BPE with the Llama 4 split pattern and special tokens.",
    "pretrain": "Train a model from random weights on packed documents, text and images mixed.",
    "inspect": "Show what training data looks like, with the loss mask in colour.",
    "sft": "Tune a model on conversations.",
    "rl": "Let a model play verifiable tasks and learn from its grades.",
    "dpo": "Learn from pairs of a better and a worse answer.",
    "qat": "Tune a model so that it loses little in few bits: full, then an adapter, then DPO.",
    "chat": "Talk to a model in the terminal.",
    "redteam": "Attack a model with templates: success by category, and over-refusal.",
    "serve": "Serve a model over HTTP: OpenAI's API and others, and a page to chat in.",
    "evaluate": "Measure a model on tasks.",
    "guard": "Train a small safety classifier, judge texts, prune a model to a dense one.",
    "quantize": "Write a model with fewer bits a weight, and compare it after re-loading.",
    "export": "Write a model in another format, and compare it after re-loading.",
    "import-meta": "Turn Meta's consolidated checkpoint files into a model folder.",
    "env": "Print versions and hardware for a bug report.",
}
"""Each verb with the first line of its recipe's `Config`."""


def usage() -> str:
    """The text of `herdling --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: herdling VERB [PATH|PRESET] [--config run.yaml] [--flags]",
            "",
            "The whole life of a Llama-4-style model: train, tune, run and export.",
            "",
            *lines,
            "",
            "  herdling VERB --help   every setting of a verb",
            "  herdling --version     the version",
            "  --debug                with any verb: the whole trace of an error (or HERDLING_DEBUG=1)",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit status."""
    args = sys.argv[1:] if argv is None else argv
    debug = "--debug" in args or os.environ.get("HERDLING_DEBUG", "") not in ("", "0")
    args = [arg for arg in args if arg != "--debug"]
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] == "--version":
        import herdling

        print(f"herdling {herdling.__version__}")
        return 0
    if args[0] not in VERBS:
        from herdling.config import nearest

        return _fail(f"unknown verb {args[0]!r}{nearest(args[0], list(VERBS))}", 2)
    spoken, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        return _run(args[0], args[1:], debug)
    finally:
        warnings.formatwarning = spoken


def _run(verb: str, args: list[str], debug: bool) -> int:
    from herdling.config import parse
    from herdling.errors import ConfigError, Error

    recipe = None
    try:
        recipe = importlib.import_module(f"herdling.recipes.{verb.replace('-', '_')}")
        status = recipe.main(parse(recipe.Config, args, prog=f"herdling {verb}"))
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as stop:
        return _stopped(stop, recipe, verb, args)
    except BrokenPipeError:
        # The reader of a pipe left (`| head`); what Python still holds must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Error, OSError) as error:
        if debug:
            raise
        return _fail(_words(error), 2 if isinstance(error, ConfigError) else 1)


def _stopped(stop: KeyboardInterrupt, recipe: ModuleType | None, verb: str, args: list[str]) -> int:
    """Say what was saved and how to go on."""
    command = ["herdling", verb, *args]
    resumable = recipe is not None and any(f.name == "resume" for f in fields(recipe.Config))
    if resumable and "--resume" not in args:
        command.append("--resume")
    saved = getattr(stop, "saved", False)
    print(f"herdling: {str(stop) or 'stopped'}", file=sys.stderr)
    if saved or resumable:
        print(f"to go on: {shlex.join(command)}", file=sys.stderr)
    return getattr(stop, "status", 130)


def _words(error: Exception) -> str:
    """What to print of an error: of the system's own the file and the reason, without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    # Of a rename the target is what was asked for, the source a temporary name of ours.
    file = error.filename if error.filename2 is None else error.filename2
    return error.strerror if file is None else f"{os.fsdecode(file)}: {error.strerror}"


def _fail(message: str, status: int) -> int:
    print(f"herdling: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _one_line(message: Warning | str, *_: object) -> str:
    return f"herdling: warning: {message}\n"
