"""One self-contained HTML page about a run: plots, tables, samples with their pictures.

Plots are SVG made by matplotlib (extra `plots`), pictures are data URIs: nothing is fetched, and the
page can be mailed as it is.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from herdling.errors import require
from herdling.eval.harness import Sample, Score, question
from herdling.eval.likelihood import Likelihood
from herdling.files import atomic_file

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.7rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #dde3ea;padding-bottom:.2rem}
p.lead{color:#51606f;margin:.3rem 0 1rem}table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:#51606f;font-weight:600}td,th{padding:.28rem .6rem;border-bottom:1px solid #edf0f4}
td{overflow-wrap:anywhere}td:first-child{overflow-wrap:normal}@media(min-width:62rem){td.n,th.n{white-space:nowrap}}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}
.bar{position:relative;height:.85rem;width:11rem;background:#edf0f4;border-radius:3px}
.bar i{position:absolute;inset:0 auto 0 0;background:#2f6fb3;border-radius:3px}
.bar b{position:absolute;top:-2px;bottom:-2px;width:2px;background:#c0392b}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.8rem}
.card{border:1px solid #dde3ea;border-radius:6px;padding:.6rem;font-size:.85rem;overflow-wrap:anywhere}
.card img{width:100%;image-rendering:pixelated;border-radius:3px;margin-bottom:.2rem}
.right{color:#1e8449}.wrong{color:#c0392b}pre{background:#f5f7f9;padding:.7rem;border-radius:6px;overflow:auto;font-size:.85rem;white-space:pre-wrap}
"""


def write(path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write the page; sections are (heading, HTML)."""
    parts = [f"<h2>{html.escape(head)}</h2>\n{body}" for head, body in sections]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        '</title><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>\n' + "\n".join(parts) + "\n</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, "utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> str:
    """An HTML table; the last `numbers` columns are right-aligned. Strings are escaped."""
    first = len(head) - numbers

    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(
            f"<{tag}{' class=n' if i >= first else ''}>{cell if isinstance(cell, _Html) else html.escape(str(cell))}</{tag}>"
            for i, cell in enumerate(cells)
        ) + "</tr>"  # fmt: skip

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>\n{body}\n</tbody></table>"


class _Html(str):
    """Text that is markup already."""


def accuracies(scores: Sequence[Score]) -> str:
    """Accuracy of each task as a bar, with chance as a red mark."""
    rows = [
        (
            score.task,
            _Html(
                f'<div class="bar"><i style="width:{score.accuracy:.1%}"></i>'
                f'<b style="left:{score.chance:.1%}"></b></div>'
            ),
            f"{score.accuracy:.1%}",
            f"{score.low:.1%} to {score.high:.1%}",
            f"{score.chance:.1%}",
            score.items,
        )
        for score in scores
    ]
    head = ("task", "", "accuracy", "95 % interval", "chance", "items")
    return table(head, rows, numbers=4)


def likelihoods(results: Mapping[str, Likelihood]) -> str:
    """Bits per byte on held-out text beside the baselines that see that very text."""
    names = sorted({name for result in results.values() for name in result.baselines})
    rows = [
        (
            domain,
            f"{r.bits_per_byte:.3f}",
            *(f"{r.baselines[n]:.3f}" for n in names),
            f"{r.bytes:,}",
        )
        for domain, r in sorted(results.items())
    ]
    return table(("domain", "model", *names, "bytes"), rows, numbers=len(names) + 2)


def samples(picked: Iterable[Sample]) -> str:
    """Cards with the picture, the question, the reply and what would have been right."""
    cards = []
    for sample in picked:
        pictures = "".join(f'<img src="{data_uri(image)}" alt="">' for image in _images(sample))
        right = sample.grade >= 1
        verdict = "" if right else f"<br>right: {html.escape(sample.item.answer)}"
        cards.append(
            f'<div class="card">{pictures}{html.escape(question(sample.item).replace("[image]", "").strip())}'
            f'<br><b class="{"right" if right else "wrong"}">{html.escape(sample.reply)}</b>{verdict}</div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _images(sample: Sample) -> list[Image.Image]:
    parts = [m["content"] for m in sample.item.messages if not isinstance(m["content"], str)]
    return [p["image"] for content in parts for p in content if p["type"] == "image"]


def data_uri(image: Image.Image) -> str:
    """The picture as a PNG inside a URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curves(runs: Mapping[str, Sequence[tuple[int, float]]], ylabel: str) -> str:
    """Lines over tokens, in millions."""
    scaled = {name: [(tokens / 1e6, y) for tokens, y in points] for name, points in runs.items()}
    return lines(scaled, "million tokens", ylabel)


def lines(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    smooth: bool = True,
) -> str:
    """Lines through (x, y) points, faint as measured and strong as a running mean, or as they are."""
    figure, axis = _figure(8, 3)
    for name, points in runs.items():
        x, y = [at for at, _ in points], [value for _, value in points]
        if not smooth:
            axis.plot(x, y, marker=".", label=name)
            continue
        (line,) = axis.plot(x, y, alpha=0.2, linewidth=0.8)
        axis.plot(x, _smooth(y), color=line.get_color(), label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axis.legend(frameon=False)
    return _svg(figure)


def heat_map(rows: Sequence[str], shares: Sequence[Sequence[float]], title: str) -> str:
    """Shares of tokens per expert (columns), a row each; even use is white, busy blue, idle red."""
    figure, axis = _figure(8, 0.9 + 0.28 * len(rows))
    even = 1 / len(shares[0])
    ratio = [[share / even for share in row] for row in shares]
    image = axis.imshow(ratio, cmap="RdBu", vmin=0, vmax=2, aspect="auto")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(shares[0])))
    axis.set_title(title, fontsize=9)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="share / even share")
    return _svg(figure)


def _smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential running mean, corrected for its start."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        result.append(mean / total)
    return result


def _figure(width: float, height: float) -> tuple[Any, Any]:
    figures = require("matplotlib.figure", "plots")
    figure = figures.Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure, axis


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    # A fixed salt makes ids, and so the page, the same for the same data.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "herdling", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
