"""What the core's answers don't depend on: units, company, order, repetition, precision, device, storage, form of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import MLP, FokkerPlanck, StateNetwork, as_initial, sinkhorn_divergence
from stochdyn.errors import InvalidInputError
from tests.core.laws import F64, within

TS = torch.linspace(0, 1, 6, dtype=F64)
X = torch.randn(7, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(1)) + 1


class Pull(nn.Module):
    """A linear drift."""

    def __init__(self, rate: float = 1.0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=dtype))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.rate * x


def law(
    dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0, **options: Any
) -> sd.DiffusionMeasure:
    """Return an Ornstein-Uhlenbeck law, its lengths and times in other units."""
    start = Independent(Normal(length * torch.ones(2, dtype=dtype), 0.3 * length), 1)
    diffusion = length / time**0.5 * torch.tensor([0.5, 0.7], dtype=dtype)
    return sd.DiffusionMeasure(start, sd.SDE(Pull(1 / time, dtype), diffusion), **options)


@pytest.mark.parametrize("method", ["euler", "heun", "milstein"])
@pytest.mark.parametrize("unit", ["length", "time"])
def test_units_of_paths_marginals_and_divergences(unit: str, method: str) -> None:
    def answer(factor: float) -> dict[str, Tensor]:
        lengths, times = (factor, 1.0) if unit == "length" else (1.0, factor)
        p = law(F64, lengths, times, method=method)
        q = p.controlled(lambda t, x: 0.5 * x / lengths / times**0.5)
        path = q.sample(TS * times, 3, 0)
        return {
            "x": path.x / lengths,
            "log ratio": q.log_rn(path, p),
            "rate": q.log_rn(path, p, "rate"),
            "other": q.log_rn(sd.PathSample(path.ts, path.x, path.dw), p),
            "density": p.log_prob(path) + 12 * torch.log(torch.tensor(lengths, dtype=F64)),
            "marginal": q.marginal(times).sample(3, 0) / lengths,
            "drift": q.drift(0.5 * times, path.x[..., 1, :]) * times / lengths,
        }

    testing.check_units(answer)


def test_units_of_one_component_among_others() -> None:
    drift = torch.tensor([[-1.0, 2.0], [-2.0, -0.1]], dtype=F64)
    noise = torch.tensor([[0.5, 0.0], [0.2, 0.3]], dtype=F64)

    def answer(factor: float) -> dict[str, Tensor]:
        to = torch.tensor([1.0, factor], dtype=F64)
        matrix = to[:, None] * drift / to
        start, strength = torch.zeros(2, dtype=F64), to[:, None] * noise
        p = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: x @ matrix.mT, strength))
        q = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: 2 * x @ matrix.mT, strength))
        path = p.sample(TS, 3, 0)
        density = p.log_prob(path) + 5 * torch.log(torch.tensor(factor, dtype=F64))
        return {"x": path.x / to, "density": density, "log ratio": q.log_rn(path, p)}

    testing.check_units(answer)


def test_noise_of_a_small_component_that_depends_on_the_state_is_seen() -> None:
    def strength(t: Tensor, x: Tensor) -> sd.Diagonal:
        return sd.Diagonal(torch.stack([1e6 * torch.ones_like(x[..., 0]), 1e-3 * x[..., 1]], -1))

    equation = sd.SDE(lambda t, x: -x, strength, sd.Brownian(areas=True))
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), equation, method="sra")
    with pytest.raises(InvalidInputError, match="depend on the state"):
        law.sample(TS, generator=0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_of_transport(scale: float) -> None:
    def answer(factor: float) -> dict[str, Tensor]:
        plan = sd.sinkhorn(factor * X, factor * Y, 0.3 * factor**2)
        value = sinkhorn_divergence(factor * X, factor * Y, 0.3 * factor**2)
        return {"plan": plan.plan(), "value": plan.value / factor**2, "divergence": value / factor**2}

    testing.check_units(answer, (scale**0.5, scale), rtol=1e-5)


def test_company_of_paths() -> None:
    def answer(x0: Tensor) -> Tensor:
        p = sd.DiffusionMeasure(x0, sd.SDE(lambda t, x: -x, 0.5))
        q = p.controlled(lambda t, x: 0.1 * torch.tanh(x))
        noise = torch.linspace(-1, 1, 10, dtype=F64).reshape(5, 1, 2).expand(5, x0.shape[0], 2)
        path = q.drive(TS, x0, noise)
        observed = sd.PathSample(path.ts, path.x, path.dw)
        return torch.stack([q.log_rn(path, p), q.log_rn(path, p, "rate"), q.log_rn(observed, p)], -1)

    testing.check_company(answer, torch.ones(2, dtype=F64), rtol=1e-4)


def test_company_of_clouds() -> None:
    def answer(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sd.sinkhorn(x, Y.expand(*x.shape[:-2], *Y.shape), 0.3, tolerance=1e-9).plan()

    testing.check_company(answer, X, factors=(1e-3, 1.0, 1e2), rtol=1e-6)


def test_order_of_clouds_and_paths() -> None:
    testing.check_order(lambda x: sd.sinkhorn(x, Y, 0.3, tolerance=1e-10).value, X)
    testing.check_order(
        lambda x: law().log_prob(sd.PathSample(TS[:2], x.reshape(-1, 2, 2), x.reshape(-1, 1, 4)[..., :2])),
        torch.randn(6, 4, dtype=F64),
        equivariant=True,
    )


@pytest.mark.parametrize(
    "answer",
    [
        lambda: law().sample(TS, 3, 0).x,
        lambda: law().marginal(1.0).mean.detach(),
        lambda: law().controlled(lambda t, x: x).kl(law().controlled(lambda t, x: x), TS, 8, 0).mean.detach(),
        lambda: sd.sinkhorn(X, Y, 0.3).sample(5, 3),
    ],
)
def test_repetition(answer: Callable[[], Any]) -> None:
    try:
        testing.check_repetition(answer)
    except sd.errors.DiffusionMismatchError:
        pytest.fail("laws made alike are alike")


def test_the_question_does_not_matter_to_a_law_with_a_start_and_a_step() -> None:
    """Moments at a time, up to their Monte Carlo error, whatever the other times."""
    p = law(start_time=0.0, dt=0.02)
    x = [p.sample(ts, 4000, i).x[:, -1].detach() for i, ts in enumerate(([0.9, 1.0], [0.0, 1.0], TS))]
    for other in (*x[1:], p.marginal(1.0).sample(4000, 9).detach()):
        error = ((x[0].var(0) + other.var(0)) / 4000).sqrt()
        assert within(x[0].mean(0), other.mean(0), error)
        assert within(x[0].var(0), other.var(0), 3 * x[0].var(0) / 4000**0.5)


def test_precisions() -> None:
    def answer(dtype: torch.dtype) -> dict[str, Tensor]:
        p = law(dtype)
        q = p.controlled(lambda t, x: 0.5 * x)
        dw = torch.linspace(-1, 1, 10, dtype=F64).to(dtype).reshape(5, 2)
        path = q.drive(TS, torch.ones(2, dtype=dtype), dw)
        plan = sd.sinkhorn(X.to(dtype), Y.to(dtype), 0.3, tolerance=1e-5)
        return {
            "x": path.x,
            "log ratio": q.log_rn(path, p),
            "density": p.log_prob(path),
            "drift": q.drift(0.5, path.x),
            "plan": plan.plan(),
            "value": plan.value,
        }

    testing.check_precision(answer, rtol=1e-3)


STARTS: dict[str, Callable[[], Any]] = {
    "a point": lambda: torch.ones(2),
    "a normal": lambda: Independent(Normal(torch.zeros(2), 1.0), 1),
    "a covariance": lambda: MultivariateNormal(torch.zeros(2), 2 * torch.eye(2)),
    "a factor": lambda: MultivariateNormal(torch.zeros(2), scale_tril=2 * torch.eye(2)),
    "low rank": lambda: LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "a mixture": lambda: MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])), Independent(Normal(torch.randn(2, 2), 1.0), 1)
    ),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{
        f"law from {name}": lambda make=make: sd.DiffusionMeasure(
            make(), sd.SDE(Pull(1.0, torch.float32), 0.5)
        )
        for name, make in STARTS.items()
    },  # type: ignore[misc]
    "controlled law": lambda: sd.DiffusionMeasure(
        torch.ones(2), sd.SDE(Pull(1.0, torch.float32), torch.ones(2, 2))
    ).controlled(StateNetwork(2)),
    "law with a start": lambda: sd.DiffusionMeasure(
        torch.ones(2),
        sd.SDE(Pull(1.0, torch.float32), sd.Diagonal(torch.ones(2))),
        start_time=torch.tensor(0.0),
    ),
    "reversed law": lambda: sd.DiffusionMeasure(torch.ones(2), sd.SDE(Pull(1.0, torch.float32), 0.5)).reverse(
        Pull(1.0, torch.float32), 1.0, STARTS["a covariance"](), [1.0, -1.0]
    ),
    "network": lambda: MLP((2, 8, 2)),
    "forward operator": lambda: FokkerPlanck(sd.SDE(Pull(1.0, torch.float32), torch.ones(2))),
}


@pytest.mark.parametrize("name", MODULES)
def test_everything_moves(name: str) -> None:
    testing.check_device(MODULES[name]())


@pytest.mark.parametrize("name", [n for n in MODULES if "law" in n])
def test_everything_is_stored(name: str) -> None:
    torch.manual_seed(0)
    ts = torch.linspace(0, 1, 6)
    testing.check_storage(MODULES[name](), lambda p: p.sample(ts, 3, 0).x.detach())


@pytest.mark.parametrize("name", STARTS)
def test_starts_in_double_precision_are_those_of_single(name: str) -> None:
    torch.manual_seed(0)
    single = as_initial(STARTS[name]())
    x = single.draw((3,), torch.Generator().manual_seed(0))
    double = single.double()
    assert double.draw((3,), torch.Generator().manual_seed(0)).dtype == F64
    want = STARTS[name]().log_prob(x) if name not in ("a point", "a mixture") else single.log_prob(x.double())
    torch.testing.assert_close(double.log_prob(x.double()), want.double(), rtol=1e-5, atol=1e-5)


def test_forms_of_data() -> None:
    p = law(start_time=0.0)
    testing.check_forms(lambda ts: p.sample(ts, 2, 0).x.detach(), TS)
    testing.check_forms(lambda x: p.drift(0.5, x).detach(), X)
    single = law(torch.float32).sde  # a list takes torch's default precision
    testing.check_forms(lambda x: sd.DiffusionMeasure(x, single).sample(TS, 2, 0).x.detach(), X[0].float())
    testing.check_forms(lambda x: sd.sinkhorn(x, Y, 0.3).plan(), X)
    weights = torch.full((7,), 1 / 7, dtype=F64)
    testing.check_forms(lambda w: sd.sinkhorn(X, Y, 0.3, w).plan(), weights)


def test_gradients_of_laws() -> None:
    """In start, drift, diffusion, control and times; first and second derivatives."""
    dw = torch.linspace(-0.4, 0.5, 10, dtype=F64).reshape(5, 2)

    def ratio(x0: Tensor, rate: Tensor, strength: Tensor, u: Tensor) -> Tensor:
        p = sd.DiffusionMeasure(x0, sd.SDE(lambda t, x: -rate * x, strength))
        q = p.controlled(lambda t, x: u * x, lambda t, x: 1 + x**2)
        path = q.drive(TS, x0, dw)
        return q.log_rn(path, p) + q.log_rn(path, p, "rate") + path.x.square().sum()

    one = torch.ones((), dtype=F64)
    testing.check_gradients(ratio, torch.ones(2, dtype=F64), one, 0.5 * torch.ones(2, dtype=F64), 0.3 * one)


def test_gradients_of_transport() -> None:
    testing.check_gradients(lambda x: sd.sinkhorn(x, Y[:3], 0.5, tolerance=1e-12).value, X[:3], second=False)


def test_a_start_that_was_computed_once_says_so() -> None:
    """Its leaves learn; what was computed stays, with a word; a function is computed at every use."""
    loc, log_scale = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    start = as_initial(Independent(Normal(loc, log_scale.exp()), 1))
    assert [p for p in start.parameters() if p is loc]
    start.log_prob(torch.ones(1)).backward()
    with pytest.warns(sd.errors.StochdynWarning, match="initial=lambda"):
        start.log_prob(torch.ones(1)).backward()
    made = as_initial(lambda: Independent(Normal(loc, log_scale.exp()), 1))
    for _ in range(2):
        made.log_prob(torch.ones(1)).backward()
    with torch.no_grad():
        loc.fill_(3.0)
    assert float(made.distribution.mean.detach()) == 3.0
    assert float(start.distribution.mean.detach()) == 3.0


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_leaking_master_operators_are_refused_in_any_unit_of_time(scale: float) -> None:
    flip = torch.tensor([[-1.0, 2.0], [1.0, -2.0]], dtype=F64)
    leak = flip.clone()
    leak[0, 0] = -1.01
    for make in (
        lambda m: sd.core.MatrixMasterEquation(m),
        lambda m: sd.core.SparseMasterEquation(2, 2, [((0,), m), ((1,), flip)]),
    ):
        make(scale * flip)
        with pytest.raises(sd.errors.InvalidInputError, match="sum to zero"):
            make(scale * leak)


# ------------------------------------------------------------------------- one path under a batch of laws
RATES = torch.tensor([0.5, 0.9, 1.3, 0.7, 1.1], dtype=F64)
STEPS = torch.linspace(0, 1, 6, dtype=F64)  # as many steps as there are laws
ONE_PATH = torch.tensor([[1.0], [1.3], [0.7], [0.9], [1.6], [1.2]], dtype=F64)


def _diffusion(rate: Tensor, start: Any = None) -> sd.DiffusionMeasure:
    start = torch.ones(1, dtype=F64) if start is None else start
    return sd.DiffusionMeasure(start, sd.SDE(lambda t, x: -rate[..., None] * x, 1.0))


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "drift": _diffusion,
    "strength": lambda q: sd.DiffusionMeasure(
        torch.ones(1, dtype=F64), sd.SDE(lambda t, x: -x, sd.Scalar(q))
    ),
    "control": lambda q: _diffusion(RATES[0]).controlled(lambda t, x: q[..., None] + 0 * x),
    "coordinates": lambda q: _diffusion(q, torch.zeros(1, dtype=F64)).transformed("exp"),
    "linear": lambda q: sd.LinearGaussianMeasure.ornstein_uhlenbeck(
        q[..., None], initial_mean=torch.ones(1, dtype=F64)
    ),
    "square root": lambda q: sd.core.SquareRootProcess(
        q[..., None], 1.0, 0.5, initial=torch.ones(1, dtype=F64)
    ),
    "jumps": lambda q: sd.core.JumpDiffusionMeasure(
        torch.ones(1, dtype=F64),
        _diffusion(q).sde,
        2.0,
        Independent(Normal(torch.zeros(1, dtype=F64), 0.3), 1),
    ),
    "site": lambda q: sd.infer.DiffusionPath(
        sd.SDE(lambda t, x: -q[..., None] * x, 1.0), torch.ones(1, dtype=F64), STEPS
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_one_path_under_many_laws_is_as_under_each(name: str) -> None:
    """As many laws as steps: the axis of the laws must not be taken for that of the times."""
    make = BATCHES[name]
    path: Any = ONE_PATH if name == "site" else sd.PathSample.of_states(STEPS, ONE_PATH)
    together = make(RATES).log_prob(path)
    alone = torch.stack([make(rate).log_prob(path) for rate in RATES])
    torch.testing.assert_close(together, alone)
    if name in ("drift", "control", "linear", "jumps"):
        other = make(RATES[1])
        torch.testing.assert_close(
            make(RATES).log_rn(path, other), torch.stack([make(rate).log_rn(path, other) for rate in RATES])
        )
        torch.testing.assert_close(
            other.log_rn(path, make(RATES)), torch.stack([other.log_rn(path, make(rate)) for rate in RATES])
        )
