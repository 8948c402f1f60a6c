"""Equations: parameters, control, time reversal, and errors before any work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import Control, spatial_divergence
from stochdyn.errors import (
    DeviceMismatchError,
    DiffusionError,
    DtypeMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
)
from tests.core.laws import F64, ExactMemory


class Pull(nn.Module):
    """A linear drift."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(dim))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.rate * x


def test_parameters_of_drift_diffusion_noise_and_control_belong_to_the_equation() -> None:
    strength = nn.Parameter(torch.ones(2))
    sde = sd.SDE(Pull(2), sd.Diagonal(strength), ExactMemory([1.0], [1.0])).controlled(nn.Linear(4, 2))
    names = {name for name, _ in sde.named_parameters()}
    assert names == {
        "drift.rate",
        "noise.w",
        "_coefficient.value",
        "control.drift.weight",
        "control.drift.bias",
    }


@pytest.mark.parametrize("wrap", [lambda v: v, sd.Diagonal])
def test_a_learnt_diffusion_gets_gradients(wrap: object) -> None:
    strength = nn.Parameter(torch.tensor([0.5, 2.0], dtype=F64))
    sde = sd.SDE(lambda t, x: -x, wrap(strength))  # type: ignore[operator]
    path = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sde).sample(torch.linspace(0, 1, 4, dtype=F64))
    path.x[-1].sum().backward()
    assert strength.grad is not None
    # Additive noise and a linear drift: the end is linear in the strength.
    end = path.x[-1].detach()
    torch.testing.assert_close(strength.grad * strength.detach(), end)


def test_a_constant_diffusion_moves_with_the_equation() -> None:
    sde = sd.SDE(Pull(2), torch.ones(2)).double()
    assert sde.diffusion(torch.tensor(0.0), torch.zeros(2, dtype=F64)).value.dtype == F64
    assert torch.equal(sde.state_dict()["_coefficient.value"], torch.ones(2, dtype=F64))


def test_copies_are_independent_equations() -> None:
    sde = sd.SDE(Pull(2), nn.Parameter(torch.ones(2)))
    other = copy.deepcopy(sde)
    assert not other.shares_base(sde)
    assert sde.controlled(nn.Identity()).shares_base(sde)
    assert sde.shares_base(sd.SDE(sde.drift, sde._coefficient.value))  # type: ignore[union-attr]


def test_controls_add_up() -> None:
    sde = sd.SDE(Pull(1), 1.0)
    both = (
        sde.controlled(lambda t, z: z, lambda t, z: z**2)
        .controlled(lambda t, z: 2 * z)
        .controlled(precision=lambda t, z: z)
    )
    assert both.control is not None
    z = torch.tensor([[1.0], [3.0]])
    u, precision = both.control.at(torch.tensor(0.0), z)
    torch.testing.assert_close(u, 3 * z)
    torch.testing.assert_close(precision, z**2 + z)
    assert sde.control is None
    assert both.uncontrolled().control is None
    assert both.uncontrolled().shares_base(sde)


def test_control_shapes_increments_as_its_law_says() -> None:
    control = Control(lambda t, z: z, lambda t, z: torch.full_like(z, 3.0))
    z, e = torch.tensor([[2.0]], dtype=F64), torch.tensor([[0.5, 7.0]], dtype=F64)
    shaped = control.shape_increment(0, torch.tensor(0.0), 0.25, z, e, channels=1)
    # 2 dt + 0.5 / sqrt(1 + 3 dt), and the other innovation as it was
    assert shaped.tolist() == [[pytest.approx(0.5 + 0.5 / 1.75**0.5), 7.0]]


WEIGHT = torch.randn(2, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
DIFFUSIONS = {
    "matrix": lambda t, x: sd.Matrix(torch.einsum("dmj,...j->...dm", WEIGHT, torch.sin(x)) + t),
    # each strength depends on both components
    "diagonal": lambda t, x: sd.Diagonal(2 + torch.sin(x + 0.5 * x.flip(-1)) + t),
    "scalar": lambda t, x: sd.Scalar(2 + torch.sin(x.sum(-1)) + t),
}


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_divergence_of_the_covariance_is_its_derivative(kind: str) -> None:
    sde = sd.SDE(lambda t, x: -x, DIFFUSIONS[kind])
    x, t = torch.randn(4, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: sde.diffusion(t, y[None]).covariance(2)[0]))(x)
    torch.testing.assert_close(spatial_divergence(sde, t, x), torch.einsum("bijj->bi", jacobian))


def test_reversed_drift_and_diffusion() -> None:
    sde = sd.SDE(lambda t, x: t * x, lambda t, x: 1 + t * x**2)
    reverse = sde.reverse(lambda t, x: -(1 + t) * x, horizon=2.0)
    tau, x = torch.tensor(0.5, dtype=F64), torch.tensor([[0.7]], dtype=F64)
    t, g = 1.5, 1 + 1.5 * 0.49
    expected = -t * 0.7 + 2 * g * (2 * t * 0.7) + g * g * -(1 + t) * 0.7
    assert reverse.drift(tau, x).item() == pytest.approx(expected)
    assert reverse.diffusion(tau, x).value.item() == pytest.approx(g)


class _OnIncrements(Control):
    """A control that isn't a drift."""

    def shape_increment(self, n, t, dt, z, e, channels):  # type: ignore[no-untyped-def]
        return e


def test_only_a_brownian_equation_with_a_drift_is_reversed() -> None:
    score = nn.Identity()
    for sde in (
        sd.SDE(Pull(1), 1.0, ExactMemory([1.0], [1.0])),
        sd.SDE(Pull(1), 1.0).with_control(_OnIncrements()),
    ):
        with pytest.raises(InvalidInputError, match="reversed"):
            sde.reverse(score)
        with pytest.raises(InvalidInputError, match="backward"):
            sde.backward(1.0)


X32, X64 = torch.zeros(3, 2), torch.zeros(3, 2, dtype=F64)

BAD_FIELDS = {
    "drift of another size": (
        lambda: sd.SDE(lambda t, x: x[..., :1].expand(3, 5), 1.0),
        X32,
        ShapeError,
        "drift",
    ),
    "drift that is no tensor": (
        lambda: sd.SDE(lambda t, x: 0.0, 1.0),
        X32,
        ShapeError,
        "must return a tensor",
    ),
    "drift of another precision": (
        lambda: sd.SDE(Pull(2).double(), 1.0),
        X32,
        DtypeMismatchError,
        "precision",
    ),
    "network of another precision": (
        lambda: sd.SDE(lambda t, x: nn.Linear(2, 2)(x), 1.0),
        X64,
        DtypeMismatchError,
        "drift doesn't take",
    ),
    "drift on another device": (
        lambda: sd.SDE(lambda t, x: torch.zeros(2, device="meta"), 1.0),
        X32,
        DeviceMismatchError,
        "drift on meta",
    ),
    "diffusion of another precision": (
        lambda: sd.SDE(lambda t, x: -x, torch.ones(2)),
        X64,
        DtypeMismatchError,
        "diffusion",
    ),
    "diffusion of another size": (
        lambda: sd.SDE(lambda t, x: -x, torch.ones(3)),
        X32,
        ShapeError,
        "diagonal",
    ),
    "matrix of another size": (lambda: sd.SDE(lambda t, x: -x, torch.ones(3, 2)), X32, ShapeError, "matrix"),
    "diffusion zero at the start": (
        lambda: sd.SDE(lambda t, x: -x, lambda t, x: x),
        X32,
        DiffusionError,
        "positive",
    ),
    "diffusion not finite": (
        lambda: sd.SDE(lambda t, x: -x, lambda t, x: sd.Matrix(x.unsqueeze(-1) / 0)),
        X32,
        NonFiniteError,
        "finite",
    ),
    "control of another size": (
        lambda: sd.SDE(lambda t, x: -x, 1.0).controlled(lambda t, z: z[..., :1]),
        X32,
        ShapeError,
        "control's drift",
    ),
    "precision of another size": (
        lambda: sd.SDE(lambda t, x: -x, 1.0).controlled(None, lambda t, z: z[..., :1]),
        X32,
        ShapeError,
        "control's precision",
    ),
    "control of another precision": (
        lambda: sd.SDE(lambda t, x: -x, 1.0).controlled(lambda t, z: z.float()),
        X64,
        DtypeMismatchError,
        "control",
    ),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_fields_that_do_not_fit_are_named(case: str) -> None:
    build, x, error, message = BAD_FIELDS[case]
    with pytest.raises(error, match=message):
        sd.DiffusionMeasure(x, build()).sample(torch.linspace(0, 1, 3))


@pytest.mark.parametrize("diffusion", [0.0, -1.0, torch.tensor([1.0, 0.0]), sd.Scalar(-0.1), float("nan")])
def test_a_constant_diffusion_is_positive(diffusion: object) -> None:
    with pytest.raises((DiffusionError, NonFiniteError)):
        sd.SDE(lambda t, x: -x, diffusion)  # type: ignore[arg-type]


def test_drift_and_noise_are_what_they_claim() -> None:
    with pytest.raises(InvalidInputError, match="drift must be callable"):
        sd.SDE(1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="NoiseProcess"):
        sd.SDE(lambda t, x: x, 1.0, noise=0.7)  # type: ignore[arg-type]
