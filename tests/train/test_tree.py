"""python -m pytest tests/train/test_tree.py"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herdling.errors import CheckpointError
from herdling.train.tree import load_tree, save_tree

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
tensors = st.builds(
    lambda shape, dtype: torch.randint(0, 2, shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
)
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
trees = st.recursive(
    leaves | st.text() | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and type(a) is type(b)


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(), trees, max_size=3))
def test_a_tree_comes_back(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("tree")
    save_tree(folder, "state", tree)
    assert equal(tree, load_tree(folder, "state"))


def test_views_and_transposes_are_saved_as_they_look(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    save_tree(tmp_path, "s", {"t": base.T, "row": base[1], "same": base[1]})
    back = load_tree(tmp_path, "s")
    assert torch.equal(back["t"], base.T)
    assert torch.equal(back["row"], back["same"])


@pytest.mark.parametrize("tree", [{1: 2}, {"$tensor": 1}, {"a": {2}}, {"a": object()}])
def test_what_cannot_be_written_is_an_error(tmp_path, tree):
    with pytest.raises(TypeError, match=r"keys must be strings|use numbers, strings and tensors"):
        save_tree(tmp_path, "s", tree)


def test_damaged_files_are_named(tmp_path):
    save_tree(tmp_path, "s", {"a": torch.ones(3)})
    data = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match=r"s\.safetensors: cannot be read"):
        load_tree(tmp_path, "s")
    (tmp_path / "s.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"s\.json: not valid JSON"):
        load_tree(tmp_path, "s")
    (tmp_path / "s.json").unlink()
    with pytest.raises(CheckpointError, match=r"s\.json: no such file"):
        load_tree(tmp_path, "s")


def test_nan_and_infinity_in_tensors_are_fine(tmp_path):
    save_tree(tmp_path, "s", {"a": torch.tensor([torch.nan, torch.inf])})
    assert load_tree(tmp_path, "s")["a"].isnan().tolist() == [True, False]
