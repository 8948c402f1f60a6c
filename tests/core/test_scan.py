"""The scan in logarithmic depth gives what a walk through the steps gives."""

from __future__ import annotations

import pytest
import torch

from stochdyn.core import GaussianChain, affine_states, gaussian_moments


def _chain(steps: int, batch: tuple[int, ...], size: int = 3) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(steps)
    a = 0.5 * torch.randn(steps, *batch, size, size, generator=g, dtype=torch.float64)
    c = torch.randn(steps, *batch, size, generator=g, dtype=torch.float64)
    b = torch.randn(steps, *batch, size, 2, generator=g, dtype=torch.float64)
    m = torch.randn(*batch, size, generator=g, dtype=torch.float64)
    p = torch.randn(*batch, size, size, generator=g, dtype=torch.float64)
    return a, c, b @ b.mT, m, p @ p.mT


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 64, 101])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_moments_are_those_of_the_chain(steps: int, batch: tuple[int, ...]) -> None:
    a, c, q, m, p = _chain(steps, batch)
    mean, cov = gaussian_moments(a, c, q, m, p)
    expected_mean, expected_cov = GaussianChain(m, p, a, c, q).moments()
    torch.testing.assert_close(mean, expected_mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cov, expected_cov, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 3, 6, 33])
def test_columns_of_states_are_those_of_a_loop(steps: int) -> None:
    a, _, q, _, p = _chain(steps, (2,))
    states = affine_states(a, q, p)
    expected = [p]
    for n in range(steps):
        expected.append(a[n] @ expected[-1] + q[n])
    torch.testing.assert_close(states, torch.stack(expected), rtol=1e-11, atol=1e-11)


def test_batch_axes_broadcast() -> None:
    a, c, q, m, p = _chain(9, ())
    many = c[:, None] + torch.arange(4.0, dtype=torch.float64)[:, None]
    mean, cov = gaussian_moments(a[:, None], many, q[:, None].expand(-1, 4, -1, -1), m, p)
    expected = gaussian_moments(a, many[:, 2], q, m, p)
    torch.testing.assert_close(mean[:, 2], expected[0])
    torch.testing.assert_close(cov[:, 2], expected[1])


def test_gradients() -> None:
    a, c, q, m, p = (x.requires_grad_() for x in _chain(6, (), 2))
    assert torch.autograd.gradcheck(lambda *x: gaussian_moments(*x), (a, c, q, m, p))
