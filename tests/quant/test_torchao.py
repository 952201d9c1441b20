"""Our grids against torchao 0.18's fake quantization, recorded by `torchao_fixture.py`.

python -m pytest tests/quant/test_torchao.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from herdling.quant import qat
from herdling.quant.formats import Format, format_of

SEEN = load_file(Path(__file__).with_name("torchao.safetensors"))
# torchao keeps scales in the weight's type; files of this kind hold them in bfloat16.
FORMS = {
    "int4_g32": format_of("int4_g32", scale_dtype=torch.float32),
    "int8": format_of("int8"),
}


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_linears_and_every_expert_get_torchaos_numbers(name: str, form: Format):
    """Bit for bit; of experts [E, in, out] on each 2-D slice, which torchao itself leaves out."""
    x, theirs = SEEN["x"], SEEN[name]
    assert torch.equal(qat.fake(x, form), theirs)
    experts = torch.stack([x.T, 2 * x.T])
    ours = qat.fake(experts, replace(form, per="expert") if form.per == "tensor" else form, 1)
    assert torch.equal(ours[0].T, theirs)
    assert torch.equal(ours[1].T, 2 * theirs)


@pytest.mark.parametrize(("name", "form"), FORMS.items())
def test_gradients_stop_where_torchaos_do(name: str, form: Format):
    """But for the largest number, half a step beyond the last one: torchao counts it as cut off."""
    leaf = SEEN["x"].clone().requires_grad_()
    (ours,) = torch.autograd.grad(qat.fake(leaf, form).sum(), leaf)
    x, passes = SEEN["x"], SEEN[f"{name}.gradient"] != 0  # theirs is scale * (1 / scale), near 1
    assert torch.equal(ours, torch.ones_like(x))
    assert not passes.all()
    blocks = x.view(8, -1, 32) if name == "int4_g32" else x[:, None]
    most = blocks.amax(-1, keepdim=True).expand_as(blocks).reshape(8, 96)
    assert torch.equal(x[~passes], most[~passes])
