"""Rotation against matrices in float64."""

import pytest
import torch

from herdling.kernels.rope import rotate


def angles(T: int, pairs: int) -> torch.Tensor:
    return torch.rand(1, T, pairs, generator=torch.Generator().manual_seed(1)) * 100


def formula(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Each pair times its rotation matrix, in float64."""
    cos, sin = angle.double().cos()[:, :, None], angle.double().sin()[:, :, None]
    turn = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)
    pairs = x.double().unflatten(-1, (-1, 2))[..., None]
    return (turn @ pairs).flatten(-3).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 3, 16, generator=g).to(dtype).requires_grad_()
    angle = angles(9, 8)
    weight = torch.randn(2, 9, 3, 16, generator=g).to(dtype)
    outs = (rotate(x, angle.cos(), angle.sin()), formula(x, angle))
    torch.testing.assert_close(*outs, atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    grads = [torch.autograd.grad((o * weight).sum(), x)[0] for o in outs]
    torch.testing.assert_close(*grads, atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("compiling", [False, True])
def test_both_arithmetics_and_any_layout(monkeypatch, compiling):
    """What is not contiguous, and the real form that other devices and compiled models use."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.randn(3, 2, 7, 16, generator=torch.Generator().manual_seed(2)).transpose(1, 2)
    angle = angles(7, 8)
    got = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, formula(x, angle), atol=2e-6, rtol=1e-5)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x, y = torch.randn(2, 1, 1, 1, 16)
    angle = angles(1, 8)

    def dot(p: float, q: float) -> torch.Tensor:
        turned = [rotate(t, (a * angle).cos(), (a * angle).sin()) for t, a in ((x, p), (y, q))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(dot(1, 3), dot(5, 7), atol=1e-4, rtol=1e-4)
    turned = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.norm(), x.norm())
