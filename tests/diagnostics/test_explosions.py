"""Draws of a guide whose paths explode are drawn anew: what is left is the guide without them."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.diagnostics import draw_posterior, importance_evidence
from stochdyn.diagnostics.explosions import KeptShare
from stochdyn.errors import ApproximationWarning, ExplosionError


def model(limit: float = 1.0) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


class Guide(nn.Module):
    """A normal law whose draws beyond a limit explode."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.loc = limit, nn.Parameter(torch.tensor(0.5))

    def forward(self) -> Tensor:
        z = pyro.sample("z", dist.Normal(self.loc, 1.0))
        if bool((z > self.limit).any()):
            raise ExplosionError("paths explode")
        return z


def test_draws_that_explode_are_drawn_anew() -> None:
    limit = 1.5  # one draw in six lies beyond it
    with pytest.warns(ApproximationWarning, match="drawn anew"):
        draws = draw_posterior(model, Guide(limit), num_draws=2000)
    z = draws.values["z"]
    assert z.shape == (2000,)
    assert float(z.max()) <= limit
    # the truncated normal law, by its mean: 0.5 - phi(1) / Phi(1)
    normal = torch.distributions.Normal(0.0, 1.0)
    one = torch.tensor(1.0)
    exact = 0.5 - float(normal.log_prob(one).exp() / normal.cdf(one))
    assert abs(float(z.mean()) - exact) < 4 * float(z.std()) / 2000**0.5


def test_draws_one_by_one_are_drawn_anew_too() -> None:
    def single() -> None:
        if pyro.sample("z", dist.Normal(0.0, 1.0)) > 9:
            return

    with pytest.warns(sd.errors.StochdynWarning) as said:
        draws = draw_posterior(single, Guide(1.0), num_draws=50)
    assert {type(w.message) for w in said} == {sd.errors.StochdynWarning, ApproximationWarning}
    assert float(draws.values["z"].max()) <= 1.0


def single(limit: float = 1.0) -> None:
    """The same model, which can't be run on many draws at once."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 99:
        return
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


@pytest.mark.filterwarnings("ignore::stochdyn.errors.StochdynWarning")
@pytest.mark.parametrize(("program", "count"), [(model, 1000), (single, 400)])
@pytest.mark.parametrize("limit", [2.5, 1.0])
def test_the_evidence_counts_what_explodes_as_impossible(program: object, count: int, limit: float) -> None:
    draws = draw_posterior(program, Guide(limit), num_draws=count, seed=3)
    # N(z; 0, 1) N(0; z, 1) = N(0; 0, 2) N(z; 0, 1/2), of which the part below the limit is left
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    exact = -0.5 * math.log(4 * math.pi) + math.log(float(normal.cdf(torch.tensor(limit * 2**0.5))))
    share = float(normal.cdf(torch.tensor(limit - 0.5)))
    found = importance_evidence(draws.log_weights)
    assert draws.log_guide is not None
    plain = torch.distributions.Normal(0.5, 1.0).log_prob(draws.values["z"].double())
    log_share = (plain - draws.log_guide).double()
    assert float(log_share.max() - log_share.min()) < 1e-5  # the same for all draws
    # of every set that was drawn anew one learns no less than of one draw
    lost = count * (1 / share - 1) / max(1.0, -1 / math.log(share))
    error = -math.log(share) / math.sqrt(max(lost, 1.0))
    assert abs(float(log_share.mean()) - math.log(share)) < 5 * error
    assert abs(float(found.log_evidence) - exact) < 5 * math.hypot(float(found.stderr), error)


def test_the_share_that_is_kept_is_the_likeliest_one() -> None:
    assert KeptShare().log == 0.0
    share = KeptShare()
    share.count(1, 3, kept=False)
    assert math.isnan(share.log)
    for _ in range(9):
        share.count(1, 0)
    assert share.log == pytest.approx(math.log(9 / 12), rel=1e-12)
    # sets of many draws: 30 % of sets of 50 are kept, so a draw is with probability .3^(1/50)
    share = KeptShare()
    for kept in [True] * 300 + [False] * 700:
        share.count(50, 0 if kept else 1, kept)
    assert share.log == pytest.approx(math.log(0.3) / 50, rel=1e-9)
    # and sets of all sizes, by the likelihood itself
    share = KeptShare()
    for size, lost in ((100000, 1), (400, 3), (20, 5), (1, 2)):
        share.count(size, lost, size == 20)
    rates = torch.linspace(1e-3, 1.0, 100_000, dtype=torch.float64)
    terms = [t * torch.log(-torch.expm1(-rates * n)) for n, t in ((100000, 1), (400, 3), (20, 5), (1, 2))]
    likelihood = torch.stack(terms).sum(0) - 20 * rates
    assert -share.log == pytest.approx(float(rates[likelihood.argmax()]), abs=2e-5)


def test_draws_that_all_explode_are_an_error() -> None:
    with pytest.raises(ExplosionError):
        draw_posterior(model, Guide(-9.0), num_draws=50)


def test_without_explosions_nothing_is_said_and_nothing_changes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        far, none = (draw_posterior(model, Guide(limit), num_draws=50) for limit in (50.0, float("inf")))
    assert torch.equal(far.values["z"], none.values["z"])


def test_a_guide_is_trained_without_draws_that_explode() -> None:
    guide = Guide(2.5)
    with pytest.warns(ApproximationWarning, match="evaluations of the bound"):
        result = sd.infer.fit_guide(model, guide, steps=60, lr=0.05, progress=False)
    assert bool(torch.isfinite(result.losses).all())
    assert abs(float(guide.loc.detach())) < 0.3


def test_a_draw_without_a_density_ends_no_training() -> None:
    """As a path that runs far but not to infinity, from where the data are impossible."""

    def bounded(limit: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("near", torch.where(z > limit, -torch.inf, 0.0))

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.5))

        def forward(self, limit: float) -> None:
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    with pytest.warns(ApproximationWarning, match="no finite density"):
        result = sd.infer.fit_guide(bounded, Guide(), (2.0,), steps=30, lr=0.05, progress=False)
    assert bool(torch.isfinite(result.losses).all())
    with pytest.raises(sd.errors.NonFiniteLossError):
        sd.infer.fit_guide(bounded, Guide(), (-50.0,), steps=30, progress=False)


def test_a_posterior_of_parameters_for_which_paths_explode_on_the_grid() -> None:
    """Rates beyond some ten make Euler steps of a tenth explode, and a few of the guide's draws have such a rate."""
    ts = torch.linspace(0, 2, 21, dtype=torch.float64)

    def well(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(1.5, dtype=ts.dtype), 1.0))
        x = sd.infer.sample_path(
            "x", sd.SDE(lambda t, x: rate[..., None] * (x - x**3), 2.0), torch.zeros(1, dtype=ts.dtype), ts
        )
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.5), obs=y)

    wide = partial(AutoDiagonalNormal, init_scale=0.5)
    guide = sd.infer.AutoPathGuide(well, hidden=(), feedback="recomputed", rest=wide)
    y = torch.tensor(1.0, dtype=ts.dtype)
    pyro.set_rng_seed(0)
    with pytest.warns(ApproximationWarning, match="drawn anew"):
        idata = sd.to_inference_data(well, guide, args=(y,), num_draws=300, seed=1)
    assert bool(torch.isfinite(torch.as_tensor(idata.posterior["x"].values)).all())
