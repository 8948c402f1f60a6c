"""Noising processes: kernels against the equation they solve, and inverses against forward maps."""

from __future__ import annotations

import math

import pytest
import torch

from stochdyn.core import FokkerPlanck
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from stochdyn.interpolants import OU, VE, VP, MeanReverting
from stochdyn.testing import MarginalFlowSuite
from tests.interpolants.laws import F64, gaussian, mixture, processes

KINDS = ["ou", "vp", "ve", "reverting"]


@pytest.mark.parametrize("kind", KINDS)
def test_moments_solve_their_equations(kind: str) -> None:
    process = processes()[kind]
    t = torch.linspace(process.start, process.horizon, 50, dtype=F64, requires_grad=True)
    for value, slope in (
        (process.log_scale(t), process.rate(t)),
        (process.variance(t), 2 * process.rate(t) * process.variance(t) + process.squared_diffusion(t)),
        (process.log_snr(t), -0.5 * process.squared_diffusion(t) / process.variance(t)),
    ):
        total = value.sum() + 0 * t.sum()  # the scale of an exploding variance doesn't depend on time
        change = torch.autograd.grad(total, t)[0]
        torch.testing.assert_close(change, slope)
    zero = torch.zeros((), dtype=F64)
    assert process.scale(zero).item() == 1.0
    assert process.variance(zero).item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_time_is_found_again_from_the_signal_to_noise_ratio(kind: str) -> None:
    process = processes()[kind]
    t = torch.cat(
        [torch.logspace(-6, -2, 9, dtype=F64), torch.linspace(0.02, process.horizon, 20, dtype=F64)]
    )
    torch.testing.assert_close(process.time_of_log_snr(process.log_snr(t)), t, rtol=1e-9, atol=0)


def test_known_values() -> None:
    t = torch.tensor(0.4, dtype=F64)
    assert OU().double().scale(t).item() == pytest.approx(math.exp(-0.4), rel=1e-12)
    assert OU().double().variance(t).item() == pytest.approx(0.5 * (1 - math.exp(-0.8)), rel=1e-12)
    # log a = -t^2 (b1 - b0) / 4 - t b0 / 2
    assert VP().double().log_scale(t).item() == pytest.approx(-0.16 * 19.9 / 4 - 0.4 * 0.1 / 2, rel=1e-12)
    assert VE().double().std(t).item() == pytest.approx(0.01 * math.sqrt(5000**0.8 - 1), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compose(kind: str) -> None:
    process = processes()[kind]
    s, t, u = (torch.tensor(v * process.horizon, dtype=F64) for v in (0.1, 0.35, 0.8))
    (a1, v1), (a2, v2), (a, v) = process.kernel(s, t), process.kernel(t, u), process.kernel(s, u)
    torch.testing.assert_close(a1 * a2, a)
    torch.testing.assert_close(a2**2 * v1 + v2, v)
    torch.testing.assert_close(process.kernel(t, t)[1], torch.zeros((), dtype=F64))


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_of_a_mixture_solve_the_fokker_planck_equation(kind: str) -> None:
    process = processes()[kind]
    truth = mixture(process)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=F64)[:, None, None] * process.horizon
    x = truth.sample(t[:, 0, 0], 6, torch.Generator().manual_seed(1))
    operator = FokkerPlanck(process.sde())
    scale = (process.squared_diffusion(t) / process.variance(t)).max()
    for form in ("log", "score"):
        assert operator.residual(truth, t, x, form=form).abs().max() < 1e-10 * scale * (1 + x.abs().max())


def test_far_from_the_modes_nothing_overflows() -> None:
    truth = mixture(processes()["ou"], 128)
    x = torch.full((2, 128), 200.0, dtype=F64)
    assert torch.isfinite(truth.log_prob(0.1, x)).all()
    assert torch.isfinite(truth.score(0.1, x)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tweedie_gives_the_posterior_mean_of_a_gaussian(kind: str) -> None:
    process = processes()[kind]
    truth = gaussian(process)
    t, x = torch.tensor(0.3 * process.horizon, dtype=F64), torch.randn(5, 2, dtype=F64)
    gain = process.scale(t) * 0.2 / (process.scale(t) ** 2 * 0.2 + process.variance(t))
    want = truth.means[0] + gain * (x - process.location(t, truth.means[0]))
    torch.testing.assert_close(process.denoised(t, x, truth.score(t, x)), want)


class TestNoisedMixture(MarginalFlowSuite):
    """The noised mixture keeps the contract of flows."""

    def make(self):
        """Return a mixture under mean reversion."""
        return mixture(processes()["reverting"])


@pytest.mark.parametrize("spacing", ["log-snr", "uniform", "quadratic"])
def test_grids_fall_from_the_horizon_to_the_start(spacing: str) -> None:
    times = VP().grid(7, spacing)
    assert times.shape == (8,)
    assert (times.diff() < 0).all()
    assert times[[0, -1]].tolist() == [1.0, VP().start]


def test_bad_input() -> None:
    for make in (
        lambda: OU(rate=-1.0),
        lambda: OU(diffusion=0.0),
        lambda: OU(horizon=1.0, start=2.0),
        lambda: OU(start=0.0),
        lambda: VE(0.5, 0.1),
        lambda: VE(-0.1, 1.0),
        lambda: VP(beta_last=-1.0),
        lambda: MeanReverting(torch.tensor([float("nan")])),
        lambda: VP().grid(5, "cosine"),
    ):
        with pytest.raises(InvalidInputError):
            make()
    with pytest.raises(ShapeError):
        MeanReverting(torch.zeros(2, 2, 2))
    with pytest.raises(TimeGridError, match="horizon"):
        OU().check_times(torch.tensor([0.5, 6.0]))
