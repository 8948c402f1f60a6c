"""A preconditioned score is that of a Gaussian plus a network's correction, and restores what a process reverts to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import VE, VP, MeanReverting, PreconditionedScore, ScoreMatching
from stochdyn.interpolants.paths.processes import AffineProcess
from tests.interpolants.truths import F64

PROCESSES = [VP(), VE(), MeanReverting(3.0, spread=0.5)]


class Scaled(nn.Module):
    """A network with a known answer."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size, dtype=F64))

    def forward(self, tau: Tensor, y: Tensor) -> Tensor:
        assert bool((tau.abs() <= 1 + 1e-6).all())
        return self.size * (y.square() + tau)


@pytest.mark.parametrize("process", PROCESSES)
def test_without_a_correction_it_is_the_score_of_a_gaussian(process: AffineProcess) -> None:
    score = PreconditionedScore(process, Scaled(0.0), 2.0)
    t = process.grid(6)[:, None]
    x = 3 + torch.randn(7, 2, dtype=F64)
    mean = process.location(t, process.center(x).expand_as(x))
    variance = 4 * process.scale(t).square() + process.variance(t)
    torch.testing.assert_close(score(t, x), -(x - mean) / variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_prediction_and_weight_are_what_the_formulas_say(process: AffineProcess) -> None:
    """The weighted error of the score is the error of the network, at every noise level."""
    plain, other = (PreconditionedScore(process, Scaled(size), 2.0) for size in (0.0, 0.7))
    t = process.grid(6)[:, None]
    x = 3 + torch.randn(7, 2, dtype=F64)
    a, variance = process.scale(t), process.variance(t)
    root = (4 * a.square() + variance).sqrt()
    y = (x - process.center(x)) / root
    value = other.network(other._level(t), y)
    torch.testing.assert_close(
        process.denoised(t, x, other(t, x)),
        process.center(x) + (4 * a * y + 2 * variance.sqrt() * value) / root,
        rtol=1e-7,
        atol=1e-9,
    )
    error = (other(t, x) - plain(t, x)).square() * other.weight(t)
    torch.testing.assert_close(error, value.square(), rtol=1e-9, atol=0)
    objective = ScoreMatching(process, score=plain)
    torch.testing.assert_close(objective._weight(t, process.std(t)), (plain.weight(t) / variance)[:, 0])
    as_noise = ScoreMatching(process, score=plain, weight="variance")
    assert float(as_noise._weight(t, process.std(t))) == 1.0


def test_every_item_has_its_own_mean() -> None:
    process = MeanReverting(0.0, spread=0.5)
    means = torch.tensor([[-5.0], [40.0]], dtype=F64)
    objective = ScoreMatching(process, score=PreconditionedScore(process, Scaled(0.0), 2.0))
    objective({"x1": means + 1, "mean": means})
    x = objective.generator().sample((4000, 2), num_steps=40, mean=means.expand(4000, 2, 1), generator=0)
    assert bool(((x.mean(0) - means).abs() < 5 * 2 / 4000**0.5).all())
    assert bool(((x.std(0) - 2).abs() < 5 * 2 / 8000**0.5 + 0.02).all())


def test_it_learns_the_posterior_of_what_was_degraded(tmp_path: Path) -> None:
    """y = x + N(0, 1/4) with x standard normal: the posterior is N(0.8 y, 0.2)."""
    torch.manual_seed(0)
    clean = torch.randn(4000, 1)
    bad = clean + 0.5 * torch.randn(4000, 1)
    process = MeanReverting(0.0, spread=0.3)
    score = PreconditionedScore.from_data(process, clean, bad, width=32, depth=2, condition_dim=1)
    assert abs(float(score.data_scale) - 0.5) < 0.02
    objective = ScoreMatching(process, score=score)
    sd.fit(
        objective, {"x1": clean, "condition": bad, "mean": bad}, steps=400, batch_size=256, lr=5e-3, ema=0.98, seed=0,
        progress=False,
    )  # fmt: skip
    model = objective.generator()
    seen = torch.tensor([[-1.0], [0.0], [1.0]])
    many = {"condition": seen.expand(3000, 3, 1), "mean": seen.expand(3000, 3, 1)}
    x = model.sample((3000, 3), num_steps=60, generator=0, **many)
    assert float((x.mean(0) - 0.8 * seen).abs().max()) < 0.1
    assert float((x.var(0) / 0.2 - 1).abs().max()) < 0.25
    sd.save(model, tmp_path / "model")
    again = sd.load(tmp_path / "model")
    drawn = again.sample((3, 3), num_steps=5, generator=0, **{k: v[:3] for k, v in many.items()})
    torch.testing.assert_close(
        drawn, model.sample((3, 3), num_steps=5, generator=0, **{k: v[:3] for k, v in many.items()})
    )


def test_bad_input() -> None:
    with pytest.raises(errors.InvalidInputError, match="data_scale"):
        PreconditionedScore(VP(), Scaled(1.0), 0.0)
    with pytest.raises(errors.InvalidInputError, match="another process"):
        ScoreMatching(VP(), score=PreconditionedScore(VE(), Scaled(1.0), 1.0))
    with pytest.raises(errors.EmptyDataError):
        PreconditionedScore.from_data(VP(), torch.zeros(0, 2))
    with pytest.raises(errors.InvalidInputError, match="data_scale"):
        PreconditionedScore.from_data(VP(), torch.zeros(5, 2))
