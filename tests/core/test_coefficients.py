"""Scalar, diagonal and matrix diffusions agree with dense linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stochdyn as sd
from stochdyn.core import as_coefficient
from stochdyn.errors import DiffusionError, NonFiniteError, ShapeError, SingularDiffusionError

F64 = torch.float64


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


CASES = {
    "scalar": lambda: sd.Scalar(0.7),
    "scalar per path": lambda: sd.Scalar(_random(5).exp()),
    "diagonal": lambda: sd.Diagonal(_random(3).exp()),
    "diagonal per path": lambda: sd.Diagonal(_random(5, 3).exp()),
    "one strength per path": lambda: sd.Diagonal(_random(5, 1).exp()),
    "square": lambda: sd.Matrix(_random(3, 3)),
    "square per path": lambda: sd.Matrix(_random(5, 3, 3)),
    "wide": lambda: sd.Matrix(_random(3, 4)),
    "tall": lambda: sd.Matrix(_random(3, 2)),
    "tall per path": lambda: sd.Matrix(_random(5, 3, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_its_dense_matrix(case: str) -> None:
    g = CASES[case]()
    dense = g.matrix(3).expand(5, 3, -1)
    dz, v = _random(5, g.noise_dim(3)), _random(5, 3)
    torch.testing.assert_close(g.apply(dz), (dense @ dz.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(g.solve(v), (torch.linalg.pinv(dense) @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(g.covariance(3).expand(5, 3, 3), dense @ dense.mT)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("tall")])
def test_log_determinant_is_half_that_of_the_covariance(case: str) -> None:
    g = CASES[case]()
    torch.testing.assert_close(g.log_det(3), 0.5 * torch.linalg.slogdet(g.covariance(3)).logabsdet)


def test_log_determinant_takes_no_notice_of_signs() -> None:
    value = torch.tensor([-2.0, 0.5], dtype=F64)
    torch.testing.assert_close(sd.Diagonal(value).log_det(2), sd.Diagonal(value.abs()).log_det(2))


@pytest.mark.parametrize("case", CASES)
def test_time_may_lead(case: str) -> None:
    g = CASES[case]()
    dz = _random(7, 5, g.noise_dim(3))
    torch.testing.assert_close(g.apply(dz), torch.stack([g.apply(row) for row in dz]))
    v = _random(7, 5, 3)
    torch.testing.assert_close(g.solve(v), torch.stack([g.solve(row) for row in v]))


def test_noise_into_some_directions_only_has_no_determinant() -> None:
    with pytest.raises(SingularDiffusionError, match=r"3 x 2 matrix.*noise space"):
        CASES["tall"]().log_det(3)


def test_minimal_norm_solution_ignores_what_noise_cannot_reach() -> None:
    g = sd.Matrix(torch.tensor([[2.0], [0.0]]))
    assert g.solve(torch.tensor([3.0, 5.0])).tolist() == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("value", "x", "kind"),
    [
        (0.5, None, sd.Scalar),
        (0.5, torch.zeros(4, 3), sd.Scalar),
        (torch.tensor(0.5), None, sd.Scalar),
        (torch.ones(3), None, sd.Diagonal),
        (torch.ones(3, 2), None, sd.Matrix),
        (torch.ones(4, 3), torch.zeros(4, 3), sd.Diagonal),
        (torch.ones(4, 1), torch.zeros(4, 3), sd.Diagonal),
        (torch.ones(4, 3, 2), torch.zeros(4, 3), sd.Matrix),
        (torch.ones(4), torch.zeros(4, 3), sd.Scalar),
    ],
)
def test_what_users_write_is_understood(value: object, x: torch.Tensor | None, kind: type) -> None:
    assert type(as_coefficient(value, x)) is kind  # type: ignore[arg-type]


def test_a_coefficient_passes_through() -> None:
    g = sd.Scalar(1.0)
    assert as_coefficient(g) is g


def test_a_tensor_that_could_mean_anything_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"too many axes.*stochdyn.Diagonal"):
        as_coefficient(torch.ones(2, 3, 4))


@pytest.mark.parametrize("bad", [sd.Scalar(0.0), sd.Scalar(-1.0), sd.Diagonal(torch.tensor([1.0, 0.0]))])
def test_strengths_are_positive(bad: sd.core.Coefficient) -> None:
    with pytest.raises(DiffusionError, match="must be positive"):
        bad.check()


def test_matrices_are_finite_but_may_have_any_sign() -> None:
    sd.Matrix(torch.tensor([[-1.0]])).check()
    with pytest.raises(NonFiniteError):
        sd.Matrix(torch.tensor([[float("inf")]])).check()


@pytest.mark.parametrize("misfit", [sd.Diagonal(torch.ones(2)), sd.Matrix(torch.ones(2, 2))])
def test_sizes_must_fit_the_state(misfit: sd.core.Coefficient) -> None:
    with pytest.raises(ShapeError, match="doesn't fit the state"):
        misfit.check_dim(3)


def test_a_number_takes_the_precision_of_the_state() -> None:
    assert sd.Scalar(0.5).apply(torch.ones(3)).dtype == torch.float32
    assert sd.Scalar(0.5).apply(torch.ones(3, dtype=F64)).dtype == F64


def test_gradients_reach_the_strength() -> None:
    value = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    v = _random(2)
    assert torch.autograd.gradcheck(
        lambda s: (sd.Diagonal(s).solve(v) ** 2).sum() + sd.Diagonal(s).log_det(2), value
    )


G = torch.tensor([[1.0, 0.9], [0.2, 1.0]])


@pytest.mark.parametrize(
    ("diffusion", "kind"),
    [
        (lambda t, x: G, sd.Matrix),
        (lambda t, x: G[0], sd.Diagonal),
        (lambda t, x: (1 + t) * G[0], sd.Diagonal),
        (lambda t, x: (1 + t).unsqueeze(-1) * G, sd.Matrix),
        (lambda t, x: x.square(), sd.Diagonal),
        (lambda t, x: 1 + x.square().sum(-1), sd.Scalar),
        (lambda t, x: x.unsqueeze(-1) * G, sd.Matrix),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_callable_means_the_same_for_every_number_of_states(diffusion: Any, kind: type, n: int) -> None:
    """Also where the number of states is that of their components, and with time leading."""
    sde = sd.SDE(lambda t, x: -x, diffusion)
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.5)
    together = sde.diffusion(t, x)
    assert type(together) is kind
    alone = sde.diffusion(t, x[0])
    ones = torch.ones(2)
    torch.testing.assert_close(together.apply(ones.expand(n, 2))[0], alone.apply(ones))
    ts = torch.tensor([0.5, 0.7]).reshape(2, 1, 1)
    leading = sde.diffusion(ts, x.expand(2, n, 2))
    torch.testing.assert_close(leading.apply(ones.expand(2, n, 2))[0, 0], alone.apply(ones))
