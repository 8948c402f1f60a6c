"""Exact steps of linear equations have the law of continuous time on every grid, in laws and in Pyro sites."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import stochdyn as sd
from stochdyn import errors
from stochdyn.core import AffineField, Exact, SpectralDrift, integrate
from stochdyn.fractional import AffineDrift, MarkovNoise
from stochdyn.testing import check_gradients, check_precision, check_storage, check_units

F64 = torch.float64
A = torch.tensor([[-1.0, 2.0], [-3.0, -0.5]], dtype=F64)
OFFSET = torch.tensor([0.7, -0.2], dtype=F64)
G = torch.tensor([[0.2, -0.6], [0.5, 0.3]], dtype=F64)
X0 = torch.tensor([1.0, -1.0], dtype=F64)
GRIDS = {
    "regular": torch.linspace(0, 3, 7, dtype=F64),
    "irregular": torch.tensor([0.0, 0.1, 0.8, 0.9, 3.0], dtype=F64),
}


class Relaxations(AffineField):
    """Damped oscillations at rates ``(*batch)``."""

    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        self.rates = rates

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.rates[..., None, None] * A, self.rates[..., None] * OFFSET


def law(
    a: Tensor = A, offset: Tensor = OFFSET, g: Any = G, x0: Any = X0, **options: Any
) -> sd.DiffusionMeasure:
    return sd.DiffusionMeasure(x0, sd.SDE(AffineDrift(a, offset), g), **{"method": "exact"} | options)


def oracle(
    a: Tensor = A, offset: Tensor = OFFSET, g: Tensor = G, x0: Tensor = X0
) -> sd.LinearGaussianMeasure:
    return sd.LinearGaussianMeasure(a, offset, g, x0)


@pytest.mark.parametrize("grid", GRIDS)
def test_densities_are_those_of_the_linear_law(grid: str) -> None:
    ts = GRIDS[grid]
    path = law().sample(ts, 5, generator=0)
    torch.testing.assert_close(law().log_prob(path), oracle().log_prob(path), rtol=1e-10, atol=0.0)
    assert not torch.allclose(law(method="euler").log_prob(path), oracle().log_prob(path), rtol=0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_paths_have_the_covariance_of_the_linear_law(grid: str) -> None:
    """Paths are linear in their increments, so unit increments tell the covariance without any sampling."""
    ts = GRIDS[grid]
    count = 2 * (len(ts) - 1)
    unit = torch.eye(count, dtype=F64).reshape(count, -1, 2) * ts.diff().sqrt()[:, None]
    still = law().drive(ts, X0.expand(1, 2), torch.zeros(len(ts) - 1, 1, 2, dtype=F64)).x
    moves = law().drive(ts, X0.expand(count, 2), unit.movedim(0, 1)).x - still
    cov = torch.einsum("kti,ktj->tij", moves, moves)
    torch.testing.assert_close(still[0], oracle().mean(ts), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cov, oracle().covariance(ts), rtol=1e-9, atol=1e-12)


def test_paths_tend_to_those_of_eulers_method_on_the_same_increments() -> None:
    """The difference at a fixed time is of first order in the step."""
    gaps = []
    for steps in (100, 200, 400, 800):
        ts = torch.linspace(0, 1, steps + 1, dtype=F64)
        dw = torch.randn(steps, 200, 2, generator=torch.Generator().manual_seed(1), dtype=F64) / steps**0.5
        x0 = X0.expand(200, 2)
        exact, euler = (law(method=m).drive(ts, x0, dw).x[:, -1] for m in ("exact", "euler"))
        gaps.append((exact - euler).square().mean().sqrt())
    orders = torch.stack(gaps).log2().diff().neg()
    assert bool(((orders - 1).abs() < 0.4).all())


def test_a_law_with_steps_of_its_own_and_batches_of_rates() -> None:
    rates = torch.tensor([0.5, 20.0], dtype=F64)

    class Relaxation(AffineField):
        def affine(self) -> tuple[Tensor, Tensor]:
            return -rates[:, None, None], torch.zeros(2, 1, dtype=F64)

    for ts in (torch.linspace(0, 2, 3, dtype=F64), torch.tensor([0.0, 0.3, 2.0], dtype=F64)):
        for dt in (None, 0.13):
            P = sd.DiffusionMeasure(
                torch.ones(2, 1, dtype=F64), sd.SDE(Relaxation(), 1.0), dt=dt, method=Exact()
            )
            x = P.sample(ts, 20_000, generator=0).x[..., 0]
            wanted = (1 - torch.exp(-2 * rates * ts[-1])) / (2 * rates)
            # five standard errors of a variance and of a mean
            assert bool((x[..., -1].var(0) / wanted - 1).abs().max() < 5 * (2 / 20_000) ** 0.5)
            error = (wanted / 20_000).sqrt()
            assert bool(((x[..., -1].mean(0) - torch.exp(-rates * ts[-1])).abs() < 5 * error).all())


def test_a_control_costs_what_it_costs() -> None:
    u = torch.tensor([0.3, -1.1], dtype=F64)
    P = law()
    Q = P.controlled(lambda t, z: u.expand_as(z))
    for ts in GRIDS.values():
        found = Q.kl(P, ts, num_samples=4).mean
        assert float(found) == pytest.approx(0.5 * float(u.square().sum()) * 3.0, rel=1e-9)
        path = Q.sample(ts, 3, generator=0)
        bare = sd.PathSample(ts, path.x, path.x[..., 1:, :0])
        # increments that are read off the states are those that drove them
        torch.testing.assert_close(Q.log_rn(bare, P), Q.log_rn(path, P), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_site_has_the_evidence_of_continuous_time(grid: str) -> None:
    """Without a word, as the drift is affine. The guide is exact for a linear model, so the bound is the evidence."""
    ts, y = GRIDS[grid], torch.tensor([0.4, -0.9], dtype=F64)
    start = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    field = AffineDrift(A, OFFSET)

    def model(method: str | None) -> Callable[[], None]:
        def run() -> None:
            x = sd.infer.sample_path("x", sd.SDE(field, G), start, ts, method=method)
            pyro.sample("y", dist.Normal(x[..., -1, :], 0.1).to_event(1), obs=y)

        return run

    found = {}
    for method in (None, "euler"):
        pyro.clear_param_store()
        guide = sd.infer.AutoPathGuide(model(method))
        found[method] = -float(Trace_ELBO(8, vectorize_particles=True).loss(model(method), guide))
    exact = sd.LinearGaussianMeasure(A, OFFSET, G, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    wanted = float(exact.log_evidence(ts[-1:], y[None], 0.1))
    assert found[None] == pytest.approx(wanted, abs=1e-6)
    assert abs(found["euler"] - wanted) > 0.1


def test_series_with_grids_of_their_own_have_the_density_of_the_linear_law() -> None:
    ts = torch.stack([GRIDS["irregular"], 3 * GRIDS["irregular"], GRIDS["irregular"].square() + 1])
    field = Relaxations(torch.tensor([[0.5, 1.0, 20.0]], dtype=F64) * torch.tensor([[1.0], [3.0]], dtype=F64))
    starts = X0.expand(2, 3, 2)
    cases = {
        "one equation": (AffineDrift(A, OFFSET), X0, lambda k: (A, OFFSET), ()),
        "one for each series": (field, starts, lambda k: tuple(v[k] for v in field.affine()), (2,)),
    }
    for drift, x0, of, lead in cases.values():
        P = sd.DiffusionMeasure(x0, sd.SDE(drift, G), method="exact")
        path = P.sample(ts, 5, generator=0)
        assert path.x.shape == (5, *lead, 3, 5, 2)
        found = P.log_prob(path)
        for index in itertools.product(*map(range, (*lead, 3))):
            row = sd.PathSample(ts[index[-1]], path.x[(slice(None), *index)], path.dw[(slice(None), *index)])
            linear = sd.LinearGaussianMeasure(*of(index), G, X0, initial_time=float(row.ts[0]))
            wanted = linear.log_prob(row)
            torch.testing.assert_close(found[(slice(None), *index)], wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("times", [None, 0.3], ids=["own times", "sub-steps"])
def test_series_of_a_panel_have_the_evidence_of_continuous_time(times: float | None) -> None:
    """As sites whose guide is exact for a linear model, and by a filter; each series with its own rates, times and length."""
    rows = [torch.tensor(t, dtype=F64) for t in ([0.0, 0.1, 0.8, 3.0], [0.0, 2.5], [0.0, 0.5, 0.6, 0.7, 4.0])]
    g = torch.Generator().manual_seed(0)
    panel = sd.Panel.from_arrays(rows, [torch.randn(len(t), 2, generator=g, dtype=F64) for t in rows])
    field, grid = Relaxations(torch.tensor([0.5, 1.0, 5.0], dtype=F64)), panel.grid(times)
    start = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)

    def model(method: str | None) -> Callable[[], None]:
        def run() -> None:
            with pyro.plate("series", 3):
                x = panel.at(sd.infer.sample_path("x", sd.SDE(field, G), start, grid, method=method))
                for column in range(2):
                    panel.observe(f"value_{column}", dist.Normal(x[..., column], 0.5))

        return run

    a, b = field.affine()
    ones = torch.eye(2, dtype=F64)
    linear = [sd.LinearGaussianMeasure(a[k], b[k], G, torch.zeros(2, dtype=F64), ones) for k in range(3)]
    wanted = [float(linear[k].log_evidence(t, panel.values[k, : len(t)], 0.5)) for k, t in enumerate(rows)]
    found = {}
    for method in (None, "euler"):
        pyro.clear_param_store()
        guide = sd.infer.AutoPathGuide(model(method))
        drawn = pyro.poutine.trace(guide).get_trace()
        replayed = pyro.poutine.trace(pyro.poutine.replay(model(method), trace=drawn)).get_trace()
        total = torch.zeros(3, dtype=F64)
        for trace, sign in ((replayed, 1), (drawn, -1)):
            trace.compute_log_prob()
            for node in trace.nodes.values():
                if node["type"] == "sample" and node["name"] != "series":
                    total = total + sign * node["log_prob"].detach()
        found[method] = total.tolist()
    assert found[None] == pytest.approx(wanted, abs=1e-6)
    assert max(abs(e - w) for e, w in zip(found["euler"], wanted, strict=True)) > 0.1
    seen = torch.tensor([[0.1, 0.8], [2.5, 5.0], [0.5, 0.7]], dtype=F64)
    y = torch.randn(3, 2, 2, generator=g, dtype=F64)
    law = sd.infer.NonlinearObservations(sd.SDE(field, G), start, seen, lambda x: x, 0.5)
    exact = [float(linear[k].log_evidence(seen[k], y[k], 0.5)) for k in range(3)]
    assert law.log_prob(y).tolist() == pytest.approx(exact, abs=1e-6)


def test_gradients_precision_units_and_storage() -> None:
    ts = GRIDS["irregular"]
    dw = torch.randn(len(ts) - 1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)

    def end(a: Tensor, offset: Tensor, g: Tensor, x0: Tensor) -> Tensor:
        class Field(AffineField):
            def affine(self) -> tuple[Tensor, Tensor]:
                return a, offset

        return integrate(sd.SDE(Field(), sd.Matrix(g)), x0.expand(3, 2), ts, dw, method="exact").x[-1]

    check_gradients(end, A, OFFSET, G, X0)

    def own_grids(rates: Tensor, times: Tensor) -> Tensor:
        return integrate(sd.SDE(Relaxations(rates), sd.Matrix(G)), starts, times, dw, method="exact").x[-1]

    starts, grids = X0.expand(3, 2), torch.stack([ts, 2 * ts, ts + ts.square()])
    check_gradients(own_grids, torch.tensor([0.5, 1.0, 2.0], dtype=F64), grids)

    def answer(unit: float) -> Tensor:
        """Times in another unit."""
        moved = law(A / unit, OFFSET / unit, G / unit**0.5)
        return moved.drive(unit * ts, X0.expand(3, 2), unit**0.5 * dw).x

    check_units(answer)
    lengths = [law(A, k * OFFSET, k * G).drive(ts, k * X0.expand(3, 2), dw).x / k for k in (1e-9, 1.0, 1e9)]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(lengths[2], lengths[1], rtol=1e-9, atol=0.0)

    def in_precision(dtype: torch.dtype) -> Tensor:
        parts = (v.to(dtype) for v in (A, OFFSET, G, X0))
        return law(*parts).drive(ts, X0.to(dtype).expand(3, 2), dw.to(dtype)).x

    check_precision(in_precision)
    check_storage(law(), lambda P: P.sample(ts, 2, generator=0).x)


def test_modes_with_an_exact_law_take_exact_steps() -> None:
    drift = SpectralDrift([0.5], [0.1], [2.0])
    strength = (2 * torch.tensor([0.5, 0.1, 0.1])).sqrt()
    P = sd.DiffusionMeasure(torch.zeros(3), sd.SDE(drift, sd.Diagonal(strength)), method="exact")
    x = P.sample(torch.tensor([0.0, 100.0]), 20_000, generator=0).x[:, -1]
    # stationary with unit variance, five standard errors
    assert bool(((x.var(0) - 1).abs() < 5 * (2 / 20_000) ** 0.5).all())


def test_what_has_no_exact_steps_is_refused() -> None:
    ts = GRIDS["regular"]
    field = AffineDrift(A)
    cases: list[tuple[Callable[[], Any], type[Exception]]] = [
        (lambda: sd.SDE(lambda t, x: -x, G), errors.InvalidInputError),
        (lambda: sd.SDE(field, 1.0, MarkovNoise(0.7, 4, 3.0, 0.5)), errors.InvalidInputError),
        (lambda: sd.SDE(field, lambda t, x: sd.Diagonal(1 + x.square())), errors.InvalidInputError),
        (lambda: sd.SDE(field, G[:, :1]), errors.SingularDiffusionError),
        (lambda: sd.SDE(field, torch.ones(2, 2, dtype=F64)), errors.SingularDiffusionError),
    ]
    for make, error in cases:
        with pytest.raises(error):
            sd.DiffusionMeasure(X0, make(), method="exact").sample(ts, 2)
    path = law().sample(ts, 2, generator=0)
    with pytest.raises(errors.InvalidInputError, match="other noise"):
        law(2 * A).log_rn(path, law())
    assert math.isfinite(float(law().log_prob(law().sample(ts, generator=0))))


class _Relaxation(AffineField):
    """A relaxation at a rate that a model has drawn."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.rate = rate

    def affine(self) -> tuple[Tensor, Tensor]:
        return -self.rate[..., None, None], torch.zeros(*self.rate.shape, 1, dtype=F64)


@pytest.mark.slow
def test_a_posterior_over_long_steps_is_that_of_continuous_time() -> None:
    """Rate and strength of a process read every half unit, against quadrature of the exact evidence."""
    ts = torch.linspace(0, 4, 9, dtype=F64)
    y = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=F64)

    def model() -> None:
        rate, scale = (
            pyro.sample(n, dist.LogNormal(torch.zeros((), dtype=F64), 0.5)) for n in ("rate", "scale")
        )
        sde = sd.SDE(_Relaxation(rate), sd.Scalar(scale))
        x = sd.infer.sample_path("x", sde, torch.zeros(1, dtype=F64), ts)
        pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.3).to_event(1), obs=y)

    post = sd.infer.fit_posterior(model, num_draws=1000, progress=False, seed=0)
    logs = torch.linspace(-2, 2, 33, dtype=F64)
    table = torch.zeros(33, 33, dtype=F64)
    one, zero = torch.eye(1, dtype=F64), torch.zeros(1, dtype=F64)
    for i, a in enumerate(logs):
        for j, b in enumerate(logs):
            found = sd.LinearGaussianMeasure(-a.exp() * one, zero, b.exp() * one, zero)
            table[i, j] = found.log_evidence(ts[1:], y[:, None], 0.3) - 2 * (a.square() + b.square())
    weight = torch.softmax(table.flatten(), 0).reshape(33, 33)
    for axis, name in enumerate(("rate", "scale")):
        share, values = weight.sum(1 - axis), logs.exp()
        mean = float((share * values).sum())
        sd_ = float((share * values.square()).sum() - mean**2) ** 0.5
        draws = post.idata.posterior[name].values
        # means within five standard errors of a thousand draws, deviations within ten times that of theirs
        assert abs(draws.mean() - mean) < 5 * sd_ / 1000**0.5
        assert abs(draws.std() / sd_ - 1) < 10 / 2000**0.5


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:the approximation of the posterior is poor"
)  # k-hat is about 0.7: a funnel
def test_subjects_as_sampled_paths_have_the_posterior_of_the_exact_evidence() -> None:
    """Eight subjects with times and rates of their own, their paths drawn between these times, against long exact chains."""
    data = sd.datasets.ou_subjects()
    panel = sd.Panel(data.frame, series="subject", time="time", values="y", dtype=F64)
    zero, one, grid = torch.zeros((), dtype=F64), torch.ones((), dtype=F64), panel.grid(start=0.0)

    class Relaxation(AffineField):
        def __init__(self, rate: Tensor) -> None:
            super().__init__()
            self.rate = rate

        def affine(self) -> tuple[Tensor, Tensor]:
            return -self.rate[..., None, None], self.rate[..., None]

    def model(panel: sd.Panel) -> None:
        mu, tau = pyro.sample("mu", dist.Normal(zero, 1.0)), pyro.sample("tau", dist.HalfNormal(0.5 * one))
        sigma = pyro.sample("sigma", dist.LogNormal(-0.5 * one, 0.5))
        with pyro.plate("subject", len(panel)):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            rate = pyro.deterministic("rate", torch.exp(mu + tau * z))
            equation = sd.SDE(Relaxation(rate), sd.Scalar(sigma))
            x = sd.infer.sample_path("x", equation, torch.full((1,), 2.0, dtype=F64), grid)
            panel.observe("y", dist.Normal(panel.at(x)[..., 0], 0.15))

    post = sd.infer.fit_posterior(model, panel, progress=False, seed=1)
    for name, known in data.reference.items():
        found = post.idata.posterior[name].mean(("chain", "draw")).values
        # five standard errors of some five hundred effective draws; Euler steps are off by a deviation or two
        assert (abs(found - np.array(known["mean"])) < 5 / 500**0.5 * np.array(known["sd"])).all(), name
