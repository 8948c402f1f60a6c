"""Pareto smoothing agrees with ArviZ, k-hat with tails in closed form, estimates with known evidences."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from stochdyn import SDE
from stochdyn.diagnostics import (
    draw_posterior,
    effective_sample_size,
    importance_evidence,
    importance_mean,
    pareto_smooth,
)
from stochdyn.diagnostics.container import arviz_major
from stochdyn.errors import (
    EmptyDataError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TooFewDrawsError,
    UnknownSiteError,
)
from stochdyn.infer import AutoPathGuide, DiffusionPath, khat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def pareto_log_weights(k: float, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -k * torch.log(torch.rand(size, generator=generator, dtype=torch.float64))


def reference_psis(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """ArviZ's normalised smoothed log weights and k-hat, whichever ArviZ is there."""
    if arviz_major() == 0:
        return arviz.psislw(log_weights.copy())
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weights)  # it takes log likelihoods left out, so minus the weights


@pytest.mark.parametrize("k", [0.1, 0.4, 0.7, 1.2])
def test_smoothing_agrees_with_arviz(k):
    lw = pareto_log_weights(k, 3000)
    smoothed, shape = pareto_smooth(lw)
    reference, reference_shape = reference_psis(lw.numpy())
    # ArviZ 1 rounds the length of the tail down where the paper and ArviZ 0 round it up
    tolerance = 1e-12 if arviz_major() == 0 else 0.05
    np.testing.assert_allclose((smoothed - smoothed.logsumexp(0)).numpy(), reference, atol=tolerance)
    assert shape.item() == pytest.approx(float(reference_shape), abs=tolerance)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 1.1])
def test_khat_finds_the_shape_of_a_pareto_tail(k):
    size = 100_000
    tail = math.ceil(3 * math.sqrt(size))
    # maximum likelihood's standard error; the prior draws the estimate to 0.5 by 10 / (tail + 10)
    error = (1 + k) / math.sqrt(tail)
    expected = (tail * k + 5) / (tail + 10)
    estimates = torch.tensor([pareto_smooth(pareto_log_weights(k, size, seed)).khat for seed in range(8)])
    assert abs(estimates.mean() - expected) < 4 * error / math.sqrt(8)
    assert estimates.std() < 2 * error


def test_rows_are_smoothed_apart():
    rows = torch.stack([pareto_log_weights(k, 1000) for k in (0.2, 0.9)])[:, None]
    smoothed, shape = pareto_smooth(rows)
    assert smoothed.shape == (2, 1, 1000)
    assert shape.shape == (2, 1)
    alone = pareto_smooth(rows[1, 0])
    assert torch.equal(smoothed[1, 0], alone.log_weights)
    assert shape[1, 0] == alone.khat


def test_smoothing_commutes_with_scaling_the_weights():
    lw = pareto_log_weights(0.8, 1000)
    smoothed, shape = pareto_smooth(lw - 300)
    torch.testing.assert_close(smoothed, pareto_smooth(lw).log_weights - 300, rtol=0, atol=1e-9)
    assert shape == pytest.approx(pareto_smooth(lw).khat.item(), abs=1e-9)


def test_smoothing_keeps_the_order_the_body_and_the_maximum():
    lw = pareto_log_weights(0.9, 1000)
    smoothed = pareto_smooth(lw).log_weights
    body = lw.argsort()[: 1000 - math.ceil(3 * math.sqrt(1000))]
    torch.testing.assert_close(smoothed[body], lw[body])
    assert (smoothed[lw.argsort()].diff() >= 0).all()
    assert smoothed.max() <= lw.max()


def test_dependent_draws_have_a_longer_tail():
    lw = pareto_log_weights(0.9, 5000)

    def tail(relative_efficiency: float) -> int:
        smoothed = pareto_smooth(lw, relative_efficiency=relative_efficiency).log_weights
        least = lw[(smoothed - lw).abs() > 1e-9].min()
        return int((lw >= least).sum())

    assert (tail(1.0), tail(0.25)) == (213, 425)  # 3 sqrt(S / r), rounded up


def test_equal_weights_have_no_tail():
    lw = torch.full((200,), -7.0)
    smoothed, shape = pareto_smooth(lw)
    assert torch.equal(smoothed, lw)
    assert shape == 0


def test_one_weight_above_all_others_is_no_tail_to_fit():
    lw = torch.zeros(200, dtype=torch.float64)
    lw[3] = 50.0
    assert pareto_smooth(lw).khat == math.inf


def test_zero_weights_are_allowed():
    lw = pareto_log_weights(0.3, 1000)
    lw[::3] = -math.inf
    smoothed, shape = pareto_smooth(lw)
    assert shape.isfinite()
    assert (smoothed[::3] == -math.inf).all()


# ------------------------------------------------------------------------------------------------ guides


def standard_normal():
    pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))


def normal_guide(scale):
    def guide():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), scale))

    return guide


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.7])
def test_khat_of_a_narrow_guide_is_one_minus_its_variance(scale):
    # w = exp((1/s^2 - 1) x^2 / 2) with x ~ N(0, s^2) has P(w > t) ~ t^(-1/k), k = 1 - s^2, up to a logarithm
    assert khat(standard_normal, normal_guide(scale), num_draws=20_000) == pytest.approx(
        1 - scale**2, abs=0.15
    )


def test_a_deliberately_wrong_guide_has_khat_over_seven_tenths():
    assert khat(standard_normal, normal_guide(0.2), num_draws=5000) > 0.7


def test_the_exact_guide_has_khat_under_a_half():
    assert khat(standard_normal, normal_guide(1.0)) < 0.5


def test_an_exact_guide_in_single_precision_has_khat_under_a_half():
    y = torch.linspace(-3, 3, 2000)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("record", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide():
        pyro.sample("mean", dist.Normal(y.sum() / 2001, 2001**-0.5))

    assert khat(model, guide) < 0.5


def test_an_overdispersed_guide_has_khat_under_a_half():
    assert khat(standard_normal, normal_guide(1.5)) < 0.5


def test_khat_leaves_the_random_state_alone_and_is_reproducible():
    before = torch.random.get_rng_state()
    first = khat(standard_normal, normal_guide(0.5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == khat(standard_normal, normal_guide(0.5))
    assert first != khat(standard_normal, normal_guide(0.5), seed=1)


def test_khat_takes_arguments_for_model_and_guide():
    def model(y, *, scale):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, scale), obs=y)

    def guide(y, *, scale):
        variance = 1 / (1 + scale**-2)
        pyro.sample("x", dist.Normal(variance * y / scale**2, variance**0.5))

    assert khat(model, guide, (torch.tensor(0.4),), {"scale": 0.5}, num_draws=200) < 0.5


def test_a_point_mass_has_no_khat():
    guide = AutoDelta(standard_normal)
    guide()
    with pytest.raises(InvalidInputError, match="no density"):
        khat(standard_normal, guide)


def test_a_path_guide_that_starts_at_the_exact_posterior_has_equal_weights():
    ts = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64)

    def model():
        x = pyro.sample("x", DiffusionPath(SDE(lambda t, x: -x, 1.0), start, ts))
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.3), obs=torch.tensor(0.8, dtype=torch.float64))

    guide = AutoPathGuide(model, hidden=())
    guide()
    draws = draw_posterior(model, guide, num_draws=100)
    decay = 0.9 ** torch.arange(10, dtype=torch.float64)  # Euler's, with step 0.1
    evidence = dist.Normal(0.0, (0.1 * (decay**2).sum() + 0.09).sqrt()).log_prob(torch.tensor(0.8))
    torch.testing.assert_close(draws.log_weights, evidence.expand(100), rtol=0, atol=1e-6)
    assert khat(model, guide) < 0.5


def test_khat_of_a_guide_without_a_site_names_the_site():
    with pytest.raises(UnknownSiteError, match="expected x"):
        khat(standard_normal, lambda: None)


def test_khat_of_few_draws_is_refused_before_any_work():
    def never():
        raise AssertionError("ran")

    with pytest.raises(TooFewDrawsError, match="got 99; expected at least 100"):
        khat(never, AutoNormal(never), num_draws=99)


# ------------------------------------------------------------------------------------------------ estimates


def gaussian_weights(size: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of N(0, scale^2) with weights to N(0.5, 1) times e^-3."""
    x = scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lw = dist.Normal(0.5, 1.0).log_prob(x) - dist.Normal(0.0, scale).log_prob(x) - 3.0
    return x, lw


@pytest.mark.parametrize("smooth", [False, True])
def test_the_evidence_is_within_its_error(smooth):
    _, lw = gaussian_weights(20_000, 1.5)
    estimate = importance_evidence(lw, smooth=smooth)
    assert abs(estimate.log_evidence + 3) < 4 * estimate.stderr
    assert estimate.khat < 0.5


def test_the_errors_of_evidence_and_mean_are_honest():
    evidence, mean = [], []
    for seed in range(200):
        x, lw = gaussian_weights(1000, 1.5, seed)
        estimate = importance_evidence(lw)
        evidence.append((estimate.log_evidence + 3) / estimate.stderr)
        average = importance_mean(x, lw)
        mean.append((average.mean - 0.5) / average.stderr)
    for z in (torch.stack(evidence), torch.stack(mean)):
        assert abs(z.mean()) < 4 / 200**0.5
        assert abs(z.std() - 1) < 4 / 400**0.5


def test_smoothing_lowers_the_variance_of_a_heavy_tail():
    raw, smooth = [], []
    for seed in range(60):
        _, lw = gaussian_weights(500, 0.6, seed)
        raw.append(importance_evidence(lw).log_evidence)
        smooth.append(importance_evidence(lw, smooth=True).log_evidence)
    assert torch.stack(smooth).std() < torch.stack(raw).std()


def test_the_mean_of_a_vector_is_taken_by_component():
    x, lw = gaussian_weights(500, 1.5)
    both = importance_mean(torch.stack([x, x**2], -1), lw)
    assert both.mean.shape == both.stderr.shape == (2,)
    torch.testing.assert_close(both.mean[1], importance_mean(x**2, lw).mean)


def test_the_effective_sample_size_lies_between_one_and_all():
    assert effective_sample_size(torch.zeros(40, dtype=torch.float64)) == pytest.approx(40)
    assert effective_sample_size(torch.tensor([0.0, -800.0, -900.0])) == pytest.approx(1)
    w = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert effective_sample_size(w.log()) == pytest.approx(36 / 14)
    assert effective_sample_size(torch.zeros(2, 5)).shape == (2,)


@pytest.mark.parametrize(
    ("lw", "error", "message"),
    [
        (torch.zeros(99), TooFewDrawsError, "got 99; expected at least 100"),
        (torch.zeros(0), EmptyDataError, "log_weights is empty"),
        (torch.tensor(1.0), ShapeError, "wrong number of axes"),
        (torch.cat([torch.zeros(150), torch.tensor([math.nan])]), NonFiniteError, r"log_weights\[150\]=nan"),
        (torch.cat([torch.zeros(150), torch.tensor([math.inf])]), NonFiniteError, r"log_weights\[150\]=inf"),
        (torch.full((150,), -math.inf), NonFiniteError, "all weights are zero"),
    ],
)
def test_bad_weights_are_named(lw, error, message):
    with pytest.raises(error, match=message):
        pareto_smooth(lw)


def test_weights_and_values_must_fit():
    with pytest.raises(ShapeError, match="one entry per weight"):
        importance_mean(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ShapeError, match="wrong number of axes"):
        importance_evidence(torch.zeros(2, 150))


def test_a_row_is_smoothed_as_it_is_alone():
    """Nearly equal weights beside weights of other size: no row's rounding is another's."""
    generator = torch.Generator().manual_seed(0)
    row = 1e-4 * torch.randn(400, generator=generator, dtype=torch.float64)
    other = 1e12 * torch.randn(400, generator=generator, dtype=torch.float64)
    alone, beside = pareto_smooth(row), pareto_smooth(torch.stack([row, other]))
    assert torch.equal(beside.log_weights[0], alone.log_weights)
    assert torch.equal(beside.khat[0], alone.khat)
