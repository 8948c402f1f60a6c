"""Reduced density matrices, positivity, purity and distances against the density matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import decode
from stochdyn.errors import InvalidInputError, LindbladianError, ShapeError, TooFewDrawsError
from stochdyn.povm import (
    FourPauli,
    SiteFrames,
    Tetrahedral,
    classical_fidelity,
    positivity,
    purity,
    reduced_density,
    total_variation,
    trace_distance,
)
from stochdyn.povm.frames import partial_trace, probabilities_of
from stochdyn.povm.master import marginal

F64, C128 = torch.float64, torch.complex128
MIXED = SiteFrames([Tetrahedral(), FourPauli(), Tetrahedral(rotated=False)])


def random_state(size: int) -> Tensor:
    m = torch.randn(size, size, dtype=C128)
    rho = m @ m.mH
    return rho / rho.diagonal().sum()


@pytest.mark.parametrize("povm", [Tetrahedral(), MIXED], ids=lambda f: f.name)
def test_reduced_matrices_and_purity_are_exact_for_all_probabilities(povm) -> None:
    rho = random_state(8)
    p = probabilities_of(rho, [povm.at(i) for i in range(3)])
    for sites in ([0], [2, 0], [1, 2], [2, 1, 0]):
        torch.testing.assert_close(
            reduced_density(povm, p, sites), partial_trace(rho, sites), atol=1e-12, rtol=0
        )
    assert abs(float(purity(povm, p).mean) - float(torch.trace(rho @ rho).real)) < 1e-11
    report = positivity(povm, p, [(0, 1), (1, 2)])
    exact = torch.linalg.eigvalsh(partial_trace(rho, (1, 2)))[0]
    assert abs(float(report.lowest[1] - exact)) < 1e-11
    assert report.stderr.tolist() == [0.0, 0.0]


def test_samples_estimate_them_within_their_error() -> None:
    povm, rho = Tetrahedral(), random_state(8)
    p = povm.probabilities(rho)
    generator = torch.Generator().manual_seed(3)
    a = decode(torch.multinomial(p, 20_000, True, generator=generator), 3, 4)
    exact = partial_trace(rho, (0, 2))
    estimate = reduced_density(povm, a, [0, 2])
    assert abs(float(estimate.diagonal().sum().real) - 1) < 1e-12
    # an entry of a two-site dual has modulus at most 9, so its error is below 9 / sqrt(20000)
    assert float((estimate - exact).abs().max()) < 4.5 * 9 / 20_000**0.5
    pure = purity(povm, a)
    assert abs(float(pure.mean) - float(torch.trace(rho @ rho).real)) < 4.5 * float(pure.stderr)
    report = positivity(povm, a, [(0, 2)], generator=generator)
    lowest = float(torch.linalg.eigvalsh(exact)[0])
    assert abs(report.worst[1] - lowest) < 5 * report.worst[2]
    assert 0 < report.worst[2] < 0.05


def test_probabilities_of_no_state_are_found_out() -> None:
    """The outcome that a site always gives belongs to no state: no effect of the tetrahedron is a certainty."""
    povm = Tetrahedral()
    certain = torch.tensor([1.0, 0, 0, 0], dtype=F64)
    place, lowest, _ = positivity(povm, certain, [(0,)]).worst
    assert place == (0,)
    assert abs(lowest - (-1)) < 1e-12  # 6 M - 1 has eigenvalues 2 and -1
    a = torch.zeros(100, 2, dtype=torch.long)
    assert positivity(povm, a, [(0, 1)]).worst[1] < -1.9


def test_distances() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.5, 0.0, 0.5])
    assert float(total_variation(p, q)) == 0.5
    assert float(classical_fidelity(p, q)) == 0.5
    rho, sigma = torch.diag(torch.tensor([1.0, 0])), torch.diag(torch.tensor([0.0, 1]))
    assert float(trace_distance(rho, sigma)) == 1.0
    torch.testing.assert_close(marginal(torch.arange(4.0), [1], 2), torch.tensor([2.0, 4.0]))


BAD = {
    "a missing site": (lambda p: reduced_density(Tetrahedral(), p, [3]), LindbladianError, "sites 0 to 2"),
    "a site twice": (lambda p: reduced_density(Tetrahedral(), p, [1, 1]), LindbladianError, "twice"),
    "no sites": (lambda p: reduced_density(Tetrahedral(), p, []), LindbladianError, "no sites"),
    "too many sites": (lambda p: reduced_density(Tetrahedral(), p, range(6)), InvalidInputError, "at most 5"),
    "a vector of another size": (lambda p: purity(Tetrahedral(), p[:-1]), ShapeError, "a power of 4"),
    "three samples": (
        lambda p: purity(Tetrahedral(), torch.zeros(3, 2, dtype=torch.long)), TooFewDrawsError, "four samples"),
    "one sample": (
        lambda p: positivity(Tetrahedral(), torch.zeros(1, 2, dtype=torch.long), [(0,)]), TooFewDrawsError, "two"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0](torch.full((64,), 1 / 64, dtype=F64))
