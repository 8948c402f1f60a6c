"""Few points carried along a flow: the derivatives of the short way are those of the graph of all steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.interpolants import FieldNetwork, Interpolant, InterpolantRegression, WhitenedField
from stochdyn.interpolants.sampling import carried
from stochdyn.interpolants.sampling.distribution import InterpolantDistribution
from tests.interpolants.truths import F64

Call = Callable[[], list[Tensor]]


def trained(kind: str) -> InterpolantRegression:
    torch.manual_seed(0)
    it = Interpolant("one-sided-linear")
    if kind == "whitened":
        net = WhitenedField.from_data(it, "velocity", torch.randn(50, 2, dtype=F64) + 2, condition_dim=1)
        torch.nn.init.normal_(net.network.layers[-1].weight, std=0.3)  # type: ignore[arg-type]
        objective = InterpolantRegression(it, velocity=net.double())
    else:
        net = FieldNetwork(2, width=16, condition_dim=1).double()
        objective = InterpolantRegression(it, **{kind: net})
    objective.starts.observe(torch.zeros(1, 2, dtype=F64), given=False)
    return objective


def both(monkeypatch: pytest.MonkeyPatch, call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a call returns on the short way, and with the graph of all steps."""
    short = call()
    with monkeypatch.context() as patch:
        patch.setattr(carried, "_FEW", 0)
        return short, call()


@pytest.mark.parametrize("kind", ["velocity", "data_prediction", "whitened"])
@pytest.mark.parametrize("method", ["rk4", "ralston", "heun", "euler"])
def test_first_and_second_derivatives_are_those_of_the_steps(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = trained(kind)
    z = torch.randn(3, 2, dtype=F64, requires_grad=True)
    context = torch.randn(3, 1, dtype=F64, requires_grad=True)
    law = InterpolantDistribution(objective.generator(), 4, method, context)
    inputs = (z, context, *objective.parameters())

    def derivatives() -> list[Tensor]:
        end = law._carry(z, context)
        first = torch.autograd.grad(end.square().sum(), inputs, allow_unused=True)
        end = law._carry(z, context)
        grads = torch.autograd.grad(end.square().sum(), (z, context), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)  # type: ignore[arg-type]
        return [torch.zeros(1, dtype=F64) if g is None else g for g in (end, *first, *second)]

    torch.testing.assert_close(*both(monkeypatch, derivatives), rtol=1e-8, atol=1e-10)


def test_derivatives_in_the_points_alone_need_no_others() -> None:
    """A sampler asks for these alone; weights that are frozen, and a flow without any, are no exception."""
    objective = trained("velocity").requires_grad_(False)
    law = InterpolantDistribution(objective.generator(), 4, "rk4", torch.zeros(1, dtype=F64))
    z = torch.randn(2, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: law._carry(p, torch.zeros(2, 1, dtype=F64)), (z,))
    still = InterpolantRegression(Interpolant("one-sided-linear"), velocity=lambda t, x: torch.ones_like(x))
    still.starts.observe(torch.zeros(1, 2, dtype=F64), given=False)
    plain = InterpolantDistribution(still.generator(), 4)
    assert torch.autograd.gradcheck(lambda p: plain._carry(p, None), (z,))


def test_a_function_of_ones_own_keeps_its_derivatives() -> None:
    """What a plain function depends on isn't known, so its derivatives come from the graph of all steps."""
    rate = torch.tensor(-1.0, dtype=F64, requires_grad=True)
    objective = InterpolantRegression(Interpolant("one-sided-linear"), velocity=lambda t, x: rate * x)
    objective.starts.observe(torch.zeros(1, 2, dtype=F64), given=False)
    law = InterpolantDistribution(objective.generator(), 20)
    z = torch.ones(1, 2, dtype=F64, requires_grad=True)
    slope = torch.autograd.grad(law._carry(z, None).sum(), rate)[0]
    torch.testing.assert_close(slope, 2 * torch.exp(rate.detach()), rtol=1e-6, atol=0)


def test_a_flow_that_breaks_down_says_so() -> None:
    objective = trained("velocity")
    with torch.no_grad():
        next(objective.parameters()).fill_(float("inf"))
    law = InterpolantDistribution(objective.generator(), 4, condition=torch.zeros(1, dtype=F64))
    z = torch.ones(1, 2, dtype=F64, requires_grad=True)
    with pytest.raises(errors.NonFiniteError):
        law._carry(z, torch.zeros(1, 1, dtype=F64))


def test_coefficients_of_a_grid_are_those_of_its_times() -> None:
    """A whitened field computes them at once for a walk, and forgets them after it."""
    field = trained("whitened").fields.networks["velocity"]
    assert isinstance(field, WhitenedField)
    times, x = torch.linspace(0, 1, 5, dtype=F64), torch.randn(3, 2, dtype=F64)
    context = torch.zeros(3, 1, dtype=F64)
    each = [field(t.expand(3, 1), x, context) for t in times]
    mixed = torch.tensor([[0.0], [0.5], [0.6]], dtype=F64)
    apart = field(mixed, x, context)
    with field.at_times(times):
        for t, value in zip(times, each, strict=True):
            torch.testing.assert_close(field(t.expand(3, 1), x, context), value, rtol=0, atol=1e-14)
        torch.testing.assert_close(field(mixed, x, context), apart, rtol=0, atol=0)
    assert not field._ready
