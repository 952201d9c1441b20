"""`herdling chat`: talk to a model in the terminal, or ask it one thing.

    herdling chat runs/demo/model
    herdling chat runs/demo/model --image chart.png -p "Which bar is the tallest?"

With `-p` only the reply is printed. Otherwise a session with history: Ctrl-C stops the reply and
keeps the session, Ctrl-D or /quit ends it. A turn reads only what is new in it.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from herdling.errors import ConfigError, Error, InputError
from herdling.guard.taxonomy import CATEGORIES
from herdling.guard.watch import Watch

if TYPE_CHECKING:
    from herdling.guard.judges import Judge
    from herdling.guard.policy import Action, Policy
    from herdling.infer.lm import LM
    from herdling.infer.request import Event, FinishReason

HELP = """\
/image FILE   show a picture with the next message
/reset        forget the conversation
/help         this list
/quit         end the session (also Ctrl-D)
Ctrl-C        stop the reply"""
# Escape sequences in a reply must not reach the terminal: all control characters but tab and newline.
UNSAFE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@dataclass(frozen=True)
class Config:
    """Talk to a model in the terminal."""

    path: Annotated[Positional[str], arg(metavar="MODEL")]
    """Model folder or hub name."""
    adapter: str | None = None
    """Folder of an adapter for it, in peft's format."""
    prompt: Annotated[str | None, arg(aliases=["-p"])] = None
    """Ask this one thing and print only the reply."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture to show with the (first) message; may be given several times."""
    system: str | None = None
    """The system message."""
    max_tokens: int = 512
    """Most tokens of a reply."""
    temperature: float = 0.6
    """0 always takes the likeliest token; higher is more varied."""
    top_p: float = 0.9
    """Draw from the likeliest tokens whose mass reaches this share."""
    seed: int | None = None
    """Makes the replies repeatable; by default each session differs."""
    guard: UseAppendAction[tuple[str, ...]] = ()
    """A folder that judges messages and replies: of `herdling guard`, or a Llama Guard 4; may be given
    several times."""
    guard_policy: Path | None = None
    """A YAML file that says what each category brings about; default: everything is blocked."""
    dtype: str | None = None
    """float32, bfloat16 or float16; default: the folder's own."""
    device: str | None = None
    """Where to run, for example cpu or cuda; default: a GPU if there is one."""


def main(config: Config) -> None:
    """Reply once or hold a session. Raises Error for anything that makes a single reply fail."""
    from herdling.guard.policy import read_policy
    from herdling.infer import lm

    policy = read_policy(config.guard_policy, config.guard)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show every character
    judge = None
    if config.guard:
        from herdling.guard.judges import Judges, open_judge

        judge = Judges([open_judge(g, config.dtype, config.device) for g in config.guard])
    opened, adapter = lm.load_with(config.adapter, config.path, config.dtype, config.device)
    session = Session(opened, config, judge, policy, adapter)
    for path in config.image:
        session.show(path)
    if config.prompt is not None:
        _say(session, config.prompt)
        return
    _talk(session)


class Session:
    """A conversation and the pictures that wait for the next message."""

    def __init__(
        self,
        lm: "LM",
        config: Config,
        judge: "Judge | None" = None,
        policy: "Policy | None" = None,
        adapter: str | None = None,
    ) -> None:
        """`judge` looks at what is said, and `policy` decides what that brings about; `adapter` replies."""
        from herdling.infer.sampler import check_seed

        check_seed(config.seed)
        if config.max_tokens < 1:
            raise ConfigError(f"max_tokens is {config.max_tokens}; it must be at least 1")
        from herdling.guard.policy import Policy

        self._lm, self._config, self._adapter = lm, config, adapter
        self._judge, self._policy = judge, policy or Policy()
        self._seed = int.from_bytes(os.urandom(6)) if config.seed is None else config.seed
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self._config.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.waiting = []

    def show(self, path: Path | str) -> None:
        """Keep a picture for the next message. Raises InputError if it cannot be used."""
        from herdling.inputs.images import open_image

        if self._lm.processor is None:
            raise InputError(f"{path}: this model is text-only; pictures need a model with vision")
        image = open_image(path, self._lm.processor.max_megapixels)
        self.waiting.append({"type": "image", "image": image})

    def reply(self, text: str, say: Callable[[str], None]) -> bool:
        """Add a user turn and the model's reply, said piece by piece; False if it was cut short.

        Ctrl-C ends the reply and keeps what was said. If nothing was, or after an Error, the turn
        is as if it had not been. Raises InputError for a turn that safeguards stop.
        """
        parts = [*self.waiting, {"type": "text", "text": text}]
        turn = {"role": "user", "content": parts if self.waiting else text}
        said: list[str] = []
        whole = True
        try:
            with closing(self._pieces([*self.messages, turn])) as pieces:
                for text, ended in pieces:
                    said.append(text)
                    say(text)
                    whole = ended is None or ended == "stop"
        except KeyboardInterrupt:
            if said:
                self._keep(turn, said)
            raise
        self._keep(turn, said)
        return whole

    def _keep(self, turn: dict[str, Any], said: list[str]) -> None:
        self.messages += [turn, {"role": "assistant", "content": "".join(said)}]
        self.waiting = []

    def _pieces(
        self, messages: list[dict[str, Any]]
    ) -> "Generator[tuple[str, FinishReason | None], None, None]":
        """What may be shown of the reply, piece by piece, and with the last why it ended."""
        if self._look(messages, self._policy.input, "your message", set()) == "replace":
            yield self._policy.message, "stop"
            return
        watch, told = Watch(self._policy, messages), set()
        with closing(self._events(messages)) as events:
            for event in events:
                ended = event.completion and event.completion.finish_reason
                watch.push(event.text)
                if self._judge is not None and not (watch.due or ended):
                    continue
                if watch.waiting and (what := self._cut(watch, told)) is not None:
                    yield what, "stop"
                    return
                if (text := watch.passed()) or ended:
                    yield text, ended

    def _cut(self, watch: "Watch", told: set[str]) -> str | None:
        """What is said in the place of the rest of a reply; None where it may go on."""
        action = self._look(watch.messages(), self._policy.output, "the reply", told)
        stopped = {"replace": self._policy.message, "block": "[stopped by the safeguards]"}
        return stopped.get(action)

    def _look(
        self, messages: list[dict[str, Any]], wanted: bool, what: str, told: set[str]
    ) -> "Action":
        """Judge the last message and tell of what is found, but for what was `told` of it before.

        Raises InputError for a turn that is blocked.
        """
        if self._judge is None or not wanted:
            return "ignore"
        verdict = self._judge.judge(messages)
        action = self._policy.action(verdict)
        new = [name for name in verdict.categories if name not in told]
        if action != "ignore" and new:
            told.update(new)
            names = ", ".join(f"{name} {CATEGORIES[name]}" for name in new)
            print(f"[{verdict.judge} objects to {what}: {names}]", file=sys.stderr)
        if action == "block" and messages[-1]["role"] == "user":
            raise InputError("the message was stopped by the safeguards")
        return action

    def _events(self, messages: list[dict[str, Any]]) -> "Generator[Event, None, None]":
        config, lm = self._config, self._lm
        request = lm.request(
            lm.render(messages),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            adapter=self._adapter,
            # Another draw each turn, repeatable; the first turn's is `lm.chat(seed=...)`.
            seed=(self._seed + len(self.messages) // 2) % 2**63,
        )
        return lm.engine.stream([request])


def _talk(session: Session) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and recall in input()
        print("Ctrl-C stops a reply, Ctrl-D ends the session, /help lists commands.")
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/quit":
            return
        if line.strip():
            _turn(session, line)


def _turn(session: Session, line: str) -> None:
    """One line of the user; an error is one line and leaves the session as it was."""
    word, _, rest = line.partition(" ")
    try:
        if not line.startswith("/"):
            _say(session, line)
        elif word == "/help":
            print(HELP)
        elif word == "/reset":
            session.reset()
        elif word == "/image" and rest.strip():
            session.show(Path(rest.strip().strip("'\"")).expanduser())
        else:
            known = "/image needs a file" if word == "/image" else f"{word} is not a command"
            print(f"{known}; /help lists them (a space before it sends it as text)")
    except KeyboardInterrupt:
        print(" [stopped]")
    except Error as problem:
        print(f"error: {problem}", file=sys.stderr)


def _say(session: Session, text: str) -> None:
    whole = session.reply(text, _print)
    print()
    if not whole:
        print("[cut short: no room for more, see --max-tokens]", file=sys.stderr)


def _print(piece: str) -> None:
    print(piece.translate(UNSAFE) if sys.stdout.isatty() else piece, end="", flush=True)
