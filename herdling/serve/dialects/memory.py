"""Conversations that clients go on with by the id of their last response.

    memory.keep(response, messages)
    response, messages = memory.find("resp_...")

In this process only, and bounded: the oldest go first, when there are too many or they take too much
room. An id is as hard to guess as a key, and whoever knows it may go on.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from herdling.serve import errors

Message = Mapping[str, Any]
Entry = tuple[dict[str, Any], list[Message], int]


class Memory:
    """At most `most` conversations, of `most_bytes` as JSON together."""

    def __init__(self, most: int = 256, most_bytes: int = 64 * 2**20) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.nbytes = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, response: dict[str, Any], messages: Sequence[Message]) -> None:
        """Store a finished response and the conversation up to it, itself included."""
        size = len(json.dumps([response, messages]))
        self.forget(response["id"])
        self._entries[response["id"]] = (response, list(messages), size)
        self.nbytes += size
        while len(self._entries) > self.most or self.nbytes > self.most_bytes:
            self.forget(next(iter(self._entries)))

    def find(self, id: str) -> tuple[dict[str, Any], list[Message]]:
        """A response and its conversation. Raises ApiError 404."""
        if id not in self._entries:
            raise errors.ApiError(
                404,
                f"No response {id[:80]!r} is stored; the last {self.most} are kept while the server "
                "runs. Send the whole conversation as input",
                type="invalid_request_error",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        self._entries.move_to_end(id)
        response, messages, _ = self._entries[id]
        return response, messages

    def forget(self, id: str) -> bool:
        """Drop a response; whether it was there."""
        entry = self._entries.pop(id, None)
        if entry is not None:
            self.nbytes -= entry[2]
        return entry is not None
