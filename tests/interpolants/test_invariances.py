"""What fields, flows and processes don't depend on: the units of data and of time."""

import math

import pytest
import torch

from stochdyn import testing
from stochdyn.interpolants import (
    OU,
    Adaptive,
    Coupling,
    EntropicCoupling,
    ExactCoupling,
    FieldNetwork,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantRegression,
    MeanReverting,
    NetworkAdapter,
    WhitenedField,
    integrate_ode,
)

F64 = torch.float64
X0 = torch.randn(60, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
X1 = 2 + X0.roll(1, 0) @ torch.tensor([[1.0, 0.3], [0.0, 0.4]], dtype=F64)


def test_units_of_data_of_a_whitened_field() -> None:
    def answer(unit: float) -> torch.Tensor:
        torch.manual_seed(0)
        path = Interpolant("linear", "brownian", scale=unit)
        field = WhitenedField.from_data(path, "velocity", X1 * unit, X0 * unit)
        with torch.no_grad():
            field.network.layers[-1].weight.add_(0.1)
        return field(torch.tensor([[0.3], [0.9]], dtype=F64), X0[:2] * unit) / unit

    testing.check_units(answer)


def test_a_component_that_never_varies_is_whitened_to_something_finite() -> None:
    points = torch.cat([X1, torch.full((60, 1), 170.0, dtype=F64)], 1)
    for dtype in (torch.float32, F64):
        field = WhitenedField.from_data(Interpolant("one-sided-linear"), "data_prediction", points.to(dtype))
        with torch.no_grad():
            field.network.layers[-1].weight.add_(0.1)
            value = field(torch.tensor(0.5, dtype=dtype), points[:4].to(dtype))
        assert (value[:, 2] - 170).abs().max() < 0.1


def test_a_whitened_field_takes_a_time_without_axes() -> None:
    field = WhitenedField.from_data(Interpolant("linear"), "velocity", X1)
    one = torch.tensor(0.3, dtype=F64)
    assert torch.equal(field(one, X0), field(one.expand(60, 1), X0))


def test_units_of_data_of_an_adaptive_flow() -> None:
    grid = torch.tensor([0.0, 1.0], dtype=F64)

    def answer(unit: float) -> torch.Tensor:
        return (
            integrate_ode(lambda t, x: torch.cos(3 * t) * unit - x, X0 * unit, grid, method=Adaptive()) / unit
        )

    testing.check_units(answer, rtol=1e-12)
    # From zero, the velocity alone says how large the states become.
    still = integrate_ode(lambda t, x: 1e9 * torch.cos(3 * t) - x, torch.zeros(2, dtype=F64), grid, "dopri5")
    exact = 1e9 * (math.cos(3) + 3 * math.sin(3) - math.exp(-1)) / 10
    assert still[0].item() == pytest.approx(exact, abs=1e-4 * 1e9)


def test_units_of_data_of_a_generator() -> None:
    def answer(unit: float) -> dict[str, torch.Tensor]:
        path = Interpolant("linear", "brownian", scale=unit)
        eye = unit**2 * torch.eye(2, dtype=F64)
        first = GaussianMixture(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), eye[None])
        ends = unit * torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=F64)
        last = GaussianMixture(torch.full((2,), 0.5, dtype=F64), ends, 0.2 * eye.expand(2, 2, 2))
        truth = GaussianMixtureInterpolant(path, first, last)
        fields = {"velocity": truth.velocity, "noise_prediction": truth.noise_prediction}
        model = InterpolantRegression(path, base=first, **fields).generator()
        x0 = X0[:3] * unit
        return {
            "flow": model.sample(3, x0=x0, num_steps=10, method="dopri5") / unit,
            "diffusion": model.sample(3, 0.5 * unit**2, x0=x0, num_steps=10, generator=0) / unit,
            "log_prob": model.log_prob(X1[:3] * unit, num_steps=6) + 2 * math.log(unit),
        }

    testing.check_units(answer, factors=(1e-6, 1e6))


def test_the_times_of_a_process_that_gives_none_follow_its_rate() -> None:
    def answer(unit: float) -> list[torch.Tensor]:
        process = OU(rate=1 / unit, diffusion=unit**-0.5)
        grid = process.grid(6)
        return [grid / unit, process.scale(grid), process.variance(grid)]

    testing.check_units(answer)
    assert MeanReverting(0.0, horizon=1e9).start == pytest.approx(1e6)


@pytest.mark.parametrize("coupling", [ExactCoupling(10.0), EntropicCoupling(0.5, condition_weight=10.0)])
def test_where_contexts_have_their_zero_does_not_matter(coupling: Coupling) -> None:
    # Numbers that single precision holds exactly, with and without the shift.
    context = (64 * X0[:, :1]).round().float() / 64

    def partner(shift: float) -> torch.Tensor:
        source = torch.Generator().manual_seed(0)
        return coupling.pair(X0.float()[:, :1], X1.float()[:, :1], context + shift, generator=source)

    assert torch.equal(partner(4096.0), partner(0.0))


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_regression_moves_whole_after_a_step(reuse: int) -> None:
    network = FieldNetwork(2).double()
    objective = InterpolantRegression(Interpolant("linear"), velocity=network, coupling="ot", reuse=reuse)
    objective((X0, X1))
    testing.check_device(objective)


@pytest.mark.parametrize("form", ["column", "flat", "event"])
def test_a_network_of_ones_own_gets_times_in_the_form_it_wants(form: str) -> None:
    seen = []
    adapter = NetworkAdapter(lambda t, x: seen.append(t) or x, time=form, time_scale=10.0)
    images = torch.zeros(3, 1, 4, 4)
    for t in (torch.tensor(0.5), torch.full((3, 1), 0.5)):
        adapter(t, images)
    assert torch.equal(*seen)
    assert seen[0].shape == {"column": (3, 1), "flat": (3,), "event": (3, 1, 1, 1)}[form]
