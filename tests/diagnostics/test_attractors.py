"""Distances between attractors agree with closed forms: divergences of Gaussians, spectra of autoregressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.diagnostics import (
    Bins,
    KernelMixture,
    power_spectrum_distance,
    state_space_divergence,
)
from stochdyn.testing import check_forms, check_order, check_repetition, check_units


def quantiles(n: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Points ``(n, 1)`` that are spread as the normal law is, without any sampling error."""
    return torch.as_tensor(scipy.stats.norm(mean, scale).ppf((np.arange(n) + 0.5) / n))[:, None]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressions(coefficient: float, count: int, n: int, seed: int) -> Tensor:
    """Stationary paths ``(count, n, 1)`` of unit variance."""
    e = normals(count, n, seed=seed) * math.sqrt(1 - coefficient**2)
    e[:, 0] /= math.sqrt(1 - coefficient**2)
    from scipy.signal import lfilter

    return torch.as_tensor(lfilter([1.0], [1.0, -coefficient], e.numpy(), axis=1))[..., None]


def test_kernels_give_the_divergence_of_two_gaussians() -> None:
    """A kernel of width b turns N(m, s^2) into N(m, s^2 + b^2), whose divergence is known. Five standard errors: 6e-7."""
    width, mean, scale = 0.5, 0.7, 1.6
    x, y = quantiles(4000), quantiles(4000, mean, scale)
    b = width * float(x.std())
    p, q = 1 + b**2, scale**2 + b**2
    exact = 0.5 * (math.log(q / p) + (p + mean**2) / q - 1)
    found = state_space_divergence(x, y, KernelMixture(width, 20_000))
    assert abs(float(found) - exact) < 5 * float(found.stderr) + 1e-4
    assert 5 * float(found.stderr) < 0.1 * exact


def test_bins_give_the_divergence_of_two_binned_gaussians() -> None:
    """The points have no sampling error, so a bin's share is that of the normal law to one point in n."""
    n, num_bins = 200_000, 12
    x, y = quantiles(n), quantiles(n, 0.4, 1.3)
    edges = np.linspace(float(x.min() - 0.1 * x.std()), float(x.max() + 0.1 * x.std()), num_bins + 1)
    p, q = (np.diff(scipy.stats.norm(m, s).cdf(edges)) for m, s in ((0, 1), (0.4, 1.3)))
    q = np.append(q, 1 - q.sum())[:num_bins]
    exact = float((p * np.log(p / q)).sum())
    assert float(state_space_divergence(x, y, Bins(num_bins))) == pytest.approx(exact, abs=2e-3 * exact)


def test_a_plane_of_bins_is_counted_as_a_table() -> None:
    x, y = normals(500, 2), 1.5 * normals(400, 2, seed=1)
    low, high = x.amin(0) - 0.1 * x.std(0), x.amax(0) + 0.1 * x.std(0)
    edges = [np.linspace(float(a), float(b), 8) for a, b in zip(low, high, strict=True)]
    tables = []
    for z in (x, y):
        inside = np.histogram2d(*z.numpy().T, bins=edges)[0].flatten()
        counts = np.append(inside, len(z) - inside.sum()) + 1e-5
        tables.append(counts / counts.sum())
    exact = float((tables[0] * np.log(tables[0] / tables[1])).sum())
    assert float(state_space_divergence(x, y, Bins(7))) == pytest.approx(exact, rel=1e-9)


def test_what_leaves_the_box_counts() -> None:
    """Half of a model's states far away cost log 2: the other half has to do with half of the probability."""
    x = normals(2000, 2)
    near, far = x, x + 1000.0
    found = float(state_space_divergence(x, torch.cat([near, far]), Bins(5)))
    assert found == pytest.approx(math.log(2), rel=1e-3)
    assert math.isfinite(float(state_space_divergence(x, far)))


@pytest.mark.parametrize("pair", [(0.5, -0.3), (0.9, 0.0)])
def test_spectra_of_autoregressions_are_as_far_apart_as_they_are(pair: tuple[float, float]) -> None:
    """Smoothing and noise of the spectra are below 0.004 here; eight seeds differ by less than 0.002 between them."""
    n, count = 2000, 400
    w = 2 * math.pi * np.arange(n // 2 + 1) / n
    shapes = [1 / (1 + a**2 - 2 * a * np.cos(w)) for a in pair]
    p, q = (s / s.sum() for s in shapes)
    exact = math.sqrt(1 - np.sqrt(p * q).sum())
    x, y = (autoregressions(a, count, n, seed) for seed, a in enumerate(pair))
    assert float(power_spectrum_distance(x, y, 3.0)) == pytest.approx(exact, abs=0.006)


def test_two_paths_of_one_law_differ_by_the_noise_of_their_spectra() -> None:
    r"""A smoothed spectrum has the relative variance v = 1 / (2 sqrt(pi) bandwidth), and the squared distance the mean v / 4."""
    bandwidth, n = 10.0, 8192
    squares = [
        float(power_spectrum_distance(normals(n, 8, seed=k), normals(n, 8, seed=100 + k), bandwidth)) ** 2
        for k in range(4)
    ]
    wanted = 1 / (8 * math.sqrt(math.pi) * bandwidth)
    assert np.mean(squares) == pytest.approx(wanted, rel=0.1)


def test_a_component_that_never_moves_shares_no_frequency() -> None:
    t = torch.arange(400.0)[:, None]
    still, wave = torch.ones(400, 1), torch.sin(0.5 * t)
    assert float(power_spectrum_distance(wave, still, 0.0)) > 0.99
    assert float(power_spectrum_distance(still, 3 * still, 0.0)) == 0.0
    assert float(power_spectrum_distance(wave, wave, 5.0)) == 0.0


ANSWERS: dict[str, Callable[[Any, Any], Any]] = {
    "bins": lambda x, y: float(state_space_divergence(x, y, Bins(6))),
    "mixture": lambda x, y: float(state_space_divergence(x, y, KernelMixture(0.5, 200))),
    "spectrum": lambda x, y: float(power_spectrum_distance(x, y, 3.0)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_depend_on_nothing_else(name: str) -> None:
    answer = ANSWERS[name]
    x, y = normals(300, 3), normals(300, 3, seed=1).cumsum(0) / 10
    check_units(lambda unit: answer(unit * x, unit * y))
    apart = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)  # units of each component
    assert answer(apart * x, apart * y) == pytest.approx(answer(x, y), rel=1e-6)
    check_repetition(lambda: answer(x, y))
    check_forms(lambda data: answer(data, y), x)
    assert answer(x.float(), y.float()) == pytest.approx(answer(x, y), rel=2e-2)
    several = (x.reshape(3, 100, 3), y.reshape(3, 100, 3))
    assert math.isfinite(answer(*several))
    if name == "bins":
        check_order(lambda data: answer(data, y), x)
        assert answer(*several) == answer(x, y)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: state_space_divergence(x, x[:, :1]), errors.ShapeError),
        (lambda x: state_space_divergence(x, x[0]), errors.ShapeError),
        (lambda x: state_space_divergence(x, x[:0]), errors.EmptyDataError),
        (lambda x: state_space_divergence(x, torch.nan * x), errors.NonFiniteError),
        (lambda x: state_space_divergence(0 * x, x), errors.InvalidInputError),
        (lambda x: state_space_divergence(x, x, "kernel"), errors.InvalidInputError),
        (lambda x: state_space_divergence(x, x, 30), errors.InvalidInputError),
        (lambda x: state_space_divergence(x.repeat(1, 10), x.repeat(1, 10)), errors.InvalidInputError),
        (lambda x: Bins(0), errors.InvalidInputError),
        (lambda x: KernelMixture(0.0), errors.InvalidInputError),
        (lambda x: power_spectrum_distance(x, x[:-1]), errors.ShapeError),
        (lambda x: power_spectrum_distance(x, x, -1.0), errors.InvalidInputError),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(normals(20, 2))
