"""Families of populations: the closed forms are those of the fields they claim to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.datasets import GaussianDenoising, MeanFieldOU, drug_screen, letters

F64 = torch.float64


def close(value: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(value, torch.tensor(wanted, dtype=F64), rtol=0, atol=1e-8)


def test_denoising_is_exact() -> None:
    """Values to eight decimals from an independent calculation."""
    law = GaussianDenoising([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]], 0.5)
    x = torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=F64)
    close(law.velocity(0.0, x)[0], [0.38011696, -0.36549708])
    close(law.velocity(0.0, x)[1], [-0.14619883, -0.62865497])
    close(law.velocity(0.5, x)[0], [0.28883685, -0.33177205])
    close(law.velocity(0.5, x)[1], [-0.03903201, -0.49570648])
    close(law.velocity(0.9, x[0]), [0.07073503, -0.08808928])
    close(law.flow(x[0]), [0.21829629, -0.22418519])
    assert law.floor() == pytest.approx(0.2067038835, abs=1e-9)


def test_flow_of_the_denoising_velocity_is_its_map() -> None:
    law = GaussianDenoising([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]], 0.5)
    start = torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=F64)
    x, n = start, 2000
    for k in range(n):
        half = x + 0.5 / n * law.velocity(k / n, x)
        x = x + law.velocity((k + 0.5) / n, half) / n
    torch.testing.assert_close(x, law.flow(start), rtol=0, atol=1e-7)


def blind(t: float, x: Tensor, num_angles: int = 4000) -> Tensor:
    r"""Return the best field that doesn't know the turn of a population: the mean over :math:`\phi` given the point."""
    total, mass = torch.zeros(2, dtype=F64), torch.zeros((), dtype=F64)
    for k in range(num_angles):
        law = rotated(math.pi * (k + 0.5) / num_angles)
        spread = law.cov + ((1 - t) * 0.5) ** 2 * torch.eye(2, dtype=F64)
        density = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), spread).log_prob(x).exp()
        total, mass = total + density * law.velocity(t, x), mass + density
    return total / mass


def rotated(angle: float) -> GaussianDenoising:
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=F64)
    return GaussianDenoising([0.0, 0.0], turn @ torch.diag(torch.tensor([1.0, 0.05], dtype=F64)) @ turn.mT)


def test_rotated_family() -> None:
    x = torch.tensor([1.0, 0.0], dtype=F64)
    close(rotated(0.0).velocity(0.0, x), [-0.2, 0.0])
    close(rotated(0.0).velocity(0.5, x), [-0.125 / 1.0625, 0.0])
    close(rotated(math.pi / 2).velocity(0.0, x), [-0.25 / 0.3, 0.0])
    close(rotated(math.pi / 2).velocity(0.5, x), [-0.125 / 0.1125, 0.0])
    assert rotated(0.3).floor() == pytest.approx(0.1802135024, abs=1e-9)
    close(blind(0.0, x, 200), [-0.42110226, 0.0])
    close(blind(0.5, x, 200), [-0.26884423, 0.0])


def test_mean_field_population() -> None:
    law = MeanFieldOU([1.0, 0.5], [[0.5, 0.1], [0.1, 0.2]], 1.0, 0.8, 0.2**0.5)
    origin = torch.zeros(2, dtype=F64)
    mean, cov = law.moments(1.0)
    close(mean, [0.33802866, 1.06570945])
    close(cov.flatten(), [0.1541341133, 0.0135335283, 0.0135335283, 0.1135335283])
    for t, wanted in (
        (0.0, [0.43333333, 1.13333333]),
        (0.5, [-0.16340647, 0.86609161]),
        (1.0, [-0.65287601, 0.41394880]),
    ):
        close(law.velocity(t, origin), wanted)
    close(law.path_velocity(0.0, origin), [-0.19418253, 0.74619962])
    close(law.path_velocity(0.5, origin), [-0.21004413, 0.82935738])
    close(law.path_velocity(0.0, origin, "independent"), [0.33802866, 1.06570945])
    close(law.path_velocity(0.5, origin, "independent"), [0.16547427, 1.06687808])
    n = 20_000
    x = law.sample(1.0, n, generator=0).double()
    assert float(((x.mean(0) - mean) / (cov.diagonal() / n).sqrt()).abs().max()) < 4.5
    error = (2 / n) ** 0.5 * cov.diagonal()
    assert float(((torch.cov(x.mT).diagonal() - cov.diagonal()) / error).abs().max()) < 4.5
    # the continuity equation of the probability flow: moments of the field give the moments' rates
    h = 1e-5
    later, before = law.moments(0.5 + h), law.moments(0.5 - h)
    torch.testing.assert_close(
        law.velocity(0.5, law.moments(0.5)[0]), (later[0] - before[0]) / (2 * h), rtol=0, atol=1e-9
    )


def test_letters_are_paired_turned_and_repeatable() -> None:
    clouds = letters("LO", count=3, obs_scale=0.5, generator=1)
    assert clouds.names == ["L"] * 3 + ["O"] * 3
    again = letters("LO", count=3, obs_scale=0.5, generator=1)
    assert all(torch.equal(a, b) for a, b in zip(clouds.starts, again.starts, strict=True))
    for x0, x1 in zip(clouds.starts, clouds.targets, strict=True):
        noise = x0 - x1
        assert float(noise.std()) == pytest.approx(0.5, abs=5 * 0.5 / (4 * len(x0)) ** 0.5)
        assert 2.5 < float(x1.norm(dim=-1).max()) < 5.0
    assert not torch.allclose(torch.cov(clouds.targets[0].mT), torch.cov(clouds.targets[1].mT), atol=0.01)
    assert letters("A", count=1, size=50).starts[0].shape == (50, 2)
    # an L has its mass left and below, unturned; its centre of mass isn't that of its box
    assert float(clouds.targets[0].mean(0).norm()) > 0.5


def test_drug_screen_depends_on_the_population() -> None:
    screen = drug_screen(count=6, treatments=2, num_cells=4000, generator=0)
    assert len(screen.starts) == 12
    assert screen.subject.tolist() == sorted(list(range(6)) * 2)
    for i in range(0, 12, 2):
        for j in (0, 1):
            # a turn keeps the norm of the mean, whatever the treatment
            before, after = screen.starts[i + j].mean(0), screen.targets[i + j].mean(0)
            assert float(after.norm()) == pytest.approx(float(before.norm()), abs=0.1)


def test_bad_input() -> None:
    for call, error in (
        (lambda: letters(""), errors.EmptyDataError),
        (lambda: letters("A", count=0), errors.InvalidInputError),
        (lambda: letters(" "), errors.InvalidInputError),
        (lambda: GaussianDenoising([0.0], [[1.0]], 0.0), errors.InvalidInputError),
        (lambda: MeanFieldOU([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], rate=0.0), errors.InvalidInputError),
        (
            lambda: MeanFieldOU([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]).path_velocity(0.5, torch.zeros(2), "x"),
            errors.InvalidInputError,
        ),
        (lambda: drug_screen(dim=1), errors.InvalidInputError),
    ):
        with pytest.raises(error):
            call()
