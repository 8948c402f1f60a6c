"""The Student-t kernel of PFGM++: density, score, law and limits."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import stochdyn as sd
from stochdyn import errors
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.interpolants import AugmentedDiffusion, AugmentedGenerator, FieldNetwork, StudentKernel

F64 = torch.float64


@pytest.mark.parametrize("degrees", [1.0, 4.0, math.inf])
def test_density_and_score(degrees: float) -> None:
    kernel, d = StudentKernel(degrees), 3
    y = torch.randn(5, d, dtype=F64)
    x = torch.randn(5, d, dtype=F64, requires_grad=True)
    got = kernel.log_prob(x, y, 0.7)
    if math.isinf(degrees):
        want = stats.multivariate_normal(torch.zeros(d), 0.49 * torch.eye(d)).logpdf((x - y).detach().numpy())
    else:
        law = stats.multivariate_t(torch.zeros(d).numpy(), 0.49 * torch.eye(d).numpy(), df=degrees)
        want = law.logpdf((x - y).detach().numpy())
    torch.testing.assert_close(got.detach(), torch.from_numpy(want))
    slope = torch.autograd.grad(got.sum(), x)[0]
    torch.testing.assert_close(kernel.score(x, y, 0.7), slope)


def test_radii_follow_the_beta_law_of_the_extended_space() -> None:
    """R = r sqrt(beta / (1 - beta)), beta ~ Beta(N / 2, D / 2), r = sigma sqrt(D)."""
    n, degrees, sigma = 3, 5.0, 0.7
    g = torch.Generator().manual_seed(0)
    draws = StudentKernel(degrees).perturb(torch.zeros(20_000, n, dtype=F64), sigma, g)
    ratio = draws.square().sum(-1) / (sigma**2 * degrees)
    beta = (ratio / (1 + ratio)).numpy()
    assert stats.kstest(beta, stats.beta(n / 2, degrees / 2).cdf).pvalue > 1e-5
    variance = sigma**2 * degrees / (degrees - 2)
    kurtosis = 3 + 6 / (degrees - 4)
    stderr = variance * ((kurtosis - 1) / draws.shape[0]) ** 0.5
    assert ((draws.var(0) - variance).abs() < 5 * stderr).all()


def test_heavy_tails_are_kept() -> None:
    """A clipped beta would cut them: at N = D = 2 one draw in a thousand lies beyond 30 radii."""
    g = torch.Generator().manual_seed(0)
    draws = StudentKernel(2.0).perturb(torch.zeros(100_000, 2, dtype=F64), 1.0, g)
    beyond = (draws.square().sum(-1) > 2 * 999).double().mean()
    assert abs(beyond.item() - 1e-3) < 5 * (1e-3 / 100_000) ** 0.5


def test_many_dimensions_are_gaussian_and_levels_broadcast() -> None:
    g = torch.Generator().manual_seed(0)
    sigma = torch.tensor([[0.1], [10.0]], dtype=F64)
    draws = StudentKernel(1e7).perturb(torch.zeros(2, 50_000, dtype=F64).T[..., None], sigma[0], g)
    assert draws.std().item() == pytest.approx(0.1, rel=0.02)
    levels = StudentKernel(math.inf).perturb(torch.zeros(2, 30_000, dtype=F64), sigma, g)
    torch.testing.assert_close(levels.std(1), sigma[:, 0], rtol=0.03, atol=0)


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="degrees"):
        StudentKernel(0.0)
    with pytest.raises(InvalidInputError, match="sigma"):
        StudentKernel(2.0).perturb(torch.zeros(2, 2), -1.0)
    with pytest.raises(EmptyDataError):
        StudentKernel(2.0).perturb(torch.zeros(0, 2), 1.0)


@pytest.mark.parametrize("degrees", [3.0, 128.0, math.inf])
def test_field_lines_end_in_the_data(degrees: float) -> None:
    """Two points with weights: the exact mean of the data is known under every kernel, and so are the draws."""
    points, weights = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.7])
    kernel = StudentKernel(degrees)

    def mean(sigma: Tensor, x: Tensor) -> Tensor:
        joint = torch.stack([kernel.log_prob(x, p.expand_as(x), sigma) for p in points], -1) + weights.log()
        return joint.softmax(-1) @ points

    model = AugmentedGenerator(mean, kernel, 2, 0.01, 80.0)
    for method in ("heun", "euler"):
        x = model.sample(2000, 40, method, generator=0)
        near = (x[:, None] - points).norm(dim=-1).min(1)
        assert float(near.values.max()) < 0.05
        share = float((near.indices == 1).double().mean())
        assert abs(share - 0.7) < 5 * (0.21 / 2000) ** 0.5 + 0.02


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_training_finds_the_law_in_any_unit(scale: float) -> None:
    torch.manual_seed(0)
    data = scale * (
        5.0 + torch.randn(4000, 1) * torch.tensor([0.5]) + torch.where(torch.rand(4000, 1) < 0.5, -2.0, 2.0)
    )
    objective = AugmentedDiffusion(FieldNetwork(1, 32, 2), 1, degrees=16.0)
    sd.fit(objective, data, steps=400, batch_size=256, lr=5e-3, progress=False)
    x = objective.generator().sample((2, 1000), 20, generator=0) / scale
    assert x.shape == (2, 1000, 1)
    assert abs(float(x.mean()) - 5.0) < 0.4
    assert abs(float(x.std()) - 4.25**0.5) < 0.4
    other = AugmentedDiffusion(FieldNetwork(1, 32, 2), 1, degrees=16.0)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(
        other.generator().sample(5, 4, generator=0), objective.generator().sample(5, 4, generator=0)
    )


def test_bad_models() -> None:
    with pytest.raises(errors.InvalidInputError, match="sigma_max"):
        AugmentedDiffusion(FieldNetwork(1), 1, sigma_min=1.0, sigma_max=0.5)
    with pytest.raises(errors.InvalidInputError, match="seen no data"):
        AugmentedDiffusion(FieldNetwork(1), 1).generator().sample(3)
    with pytest.raises(errors.ShapeError, match="another dimension"):
        AugmentedDiffusion(FieldNetwork(1), 1)(torch.zeros(3, 2))
