"""Which experts each token of a prompt and its reply went to, for people to look at."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from herdling.infer.request import Completion, Request
    from herdling.serve.replies import Replies


def by_token(request: "Request", completion: "Completion", replies: "Replies") -> dict[str, Any]:
    """`{"prompt": [...], "reply": [...]}`, each token with its text and experts per MoE layer.

    `experts` is None for what the model did not read: the reply's last token.
    """
    ids = [*request.ids, *completion.ids]
    routes = [] if completion.experts is None else completion.experts.tolist()  # (T, layers, k)
    rows = []
    for place, id in enumerate(ids):
        route = routes[place] if place < len(routes) else None
        rows.append({**_named(id, replies), "experts": route})
    return {"prompt": rows[: len(request.ids)], "reply": rows[len(request.ids) :]}


def _named(id: int, replies: "Replies") -> dict[str, Any]:
    return {"token": id, "text": replies.tokenizer.decode([id], surrogates=False)}
