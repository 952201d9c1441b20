"""Rotation by real arithmetic against the complex product it stands for."""

import pytest
import torch

from herdling.kernels.rope import rotate


def angles(T: int, pairs: int) -> torch.Tensor:
    return torch.rand(1, T, pairs, generator=torch.Generator().manual_seed(1)) * 100


def complex_form(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, 16, generator=g).to(dtype).requires_grad_()
    angle = angles(9, 8)
    weight = torch.randn(2, 9, 3, 16, generator=g).to(dtype)
    outs = (rotate(x, angle.cos(), angle.sin()), complex_form(x, angle))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    grads = [torch.autograd.grad((o * weight).sum(), x)[0] for o in outs]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x, y = torch.randn(2, 1, 1, 1, 16)
    angle = angles(1, 8)

    def dot(p: float, q: float) -> torch.Tensor:
        turned = [rotate(t, (a * angle).cos(), (a * angle).sin()) for t, a in ((x, p), (y, q))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(dot(1, 3), dot(5, 7), atol=1e-4, rtol=1e-4)
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.norm(), x.norm())
