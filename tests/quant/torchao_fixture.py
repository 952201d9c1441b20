"""Writes torchao.safetensors, what torchao's fake quantization makes of random numbers:

    pip install --no-deps --target /tmp/ao torchao==0.18.0
    PYTHONPATH=/tmp/ao python tests/quant/torchao_fixture.py

An environment of its own keeps torchao out of ours; `test_torchao.py` reads the file.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer


def main() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 96, generator=g)
    x[0] *= 100
    x[1, :32] = 0
    x[2, 5] = 30.0
    out = {"x": x}
    for name, kind, granularity in (
        ("int4_g32", torch.int4, PerGroup(32)),
        ("int8", torch.int8, PerAxis(0)),
    ):
        dynamic = {"is_dynamic": True}
        config = IntxFakeQuantizeConfig(kind, granularity, is_symmetric=True, **dynamic)
        leaf = x.clone().requires_grad_()
        made = IntxFakeQuantizer(config)(leaf)
        out[name] = made.detach().contiguous()
        out[f"{name}.gradient"] = torch.autograd.grad(made.sum(), leaf)[0].contiguous()
    save_file(out, Path(__file__).with_name("torchao.safetensors"))


if __name__ == "__main__":
    main()
