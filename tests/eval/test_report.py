"""The page's pieces: escaping, figures in the right cells, plots that are the same twice."""

import base64
import io

import pytest
from PIL import Image

from herdling.errors import MissingExtra
from herdling.eval import report
from herdling.eval.harness import Sample, Score
from herdling.eval.likelihood import Likelihood
from herdling.tasks.base import Item, ask


def test_strings_are_escaped():
    page = report.table(("a<b",), [("<script>alert(1)</script>",)])
    assert "<script>" not in page
    assert "a&lt;b" in page


def test_accuracies_show_bar_interval_and_chance():
    html = report.accuracies([Score("count", 200, 0.5, 0.43, 0.57, 0.25, 0, 1.0, [], [])])
    assert "width:50.0%" in html
    assert "left:25.0%" in html
    assert "43.0% to 57.0%" in html


def test_likelihoods_stand_beside_their_baselines():
    html = report.likelihoods(
        {"code": Likelihood(2.5, 3.0, 10, 1234, {"gzip": 2.0, "unigram": 4.0})}
    )
    assert html.index("2.500") < html.index("2.000") < html.index("4.000") < html.index("1,234")


def test_samples_show_picture_reply_and_answer():
    item = Item(ask("How many?", Image.new("RGB", (4, 4), "red")), "3", 0.0, "k")
    html = report.samples([Sample(item, "2 <b>", 0.0), Sample(item, "3", 1.0)])
    assert html.count("data:image/png;base64,") == 2
    assert "2 &lt;b&gt;" in html
    assert html.count("right: 3") == 1
    encoded = html.split("base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((0, 0)) == (255, 0, 0)


def test_plots_are_svg_and_reproducible():
    first = report.curves({"loss": [(0, 2.0), (10**6, 1.0)]}, "nats")
    assert first.startswith("<svg")
    assert first == report.curves({"loss": [(0, 2.0), (10**6, 1.0)]}, "nats")
    assert report.heat_map(["a"], [[0.5, 0.5]], "t").startswith("<svg")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"herdling\[plots\]"):
        report.curves({"loss": [(0, 1.0)]}, "nats")
