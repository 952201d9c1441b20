"""Meta's `tokenizer.model`: one token a line, its bytes in base64 and its rank.

tiktoken (openai/tiktoken, `src/lib.rs`) joins whichever neighbours make the token of lowest rank.
A merge list says the same when it holds every way to cut each token into two tokens, in the order
of the ranks; transformers' `TikTokenConverter` does so too.
"""

import base64
import binascii
from pathlib import Path

from herdling.errors import CheckpointError
from herdling.inputs.byte_level import spell


def read_ranks(path: Path | str) -> dict[bytes, int]:
    """Token bytes to rank (= id). Raises CheckpointError naming the line that is broken."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from None
    ranks: dict[bytes, int] = {}
    read = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        read += 1
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path}: line {number} is not `base64-token rank`; "
                "is this the tiktoken form of tokenizer.model?"
            ) from None
    if sorted(ranks.values()) != list(range(read)):
        raise CheckpointError(f"{path}: ranks are not 0, 1, 2, ... once each; is the file cut off?")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{path}: byte 0x{lacking[0]:02x} has no token of its own")
    return ranks


def vocab_and_merges(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The two tables of a BPE model, tokens spelled in the byte-level alphabet."""
    spelled = {token: spell(token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [(spelled[a], spelled[b]) for _, _, a, b in sorted(cuts)]
    return {spelled[token]: rank for token, rank in ranks.items()}, merges
