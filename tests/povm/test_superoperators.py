"""Sparse sums of superoperators and Faber series against dense exponentials, and what they cost by count."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from stochdyn.core import encode
from stochdyn.povm import (
    Lindbladian,
    Propagator,
    RecordLaw,
    RecordModel,
    Tetrahedral,
    infer_parameters,
    ring,
    simulate_records,
)
from stochdyn.povm.lindblad.pauli import OperatorBasis
from stochdyn.povm.master.faber import Ellipse, faber_coefficients
from stochdyn.povm.master.superoperators import SuperoperatorSum

F64 = torch.float64


def chain(n: int) -> Lindbladian:
    """A transverse field, couplings along a ring, and a decay, all with unknown strength but the couplings."""
    return Lindbladian(
        n, [("0.5*field", "X", "all"), (0.5, "ZZ", ring(n))], [("decay", "sigma-", "all"), (0.2, "Z", 0)]
    )


def operator(n: int) -> SuperoperatorSum:
    basis = OperatorBasis(2)
    return SuperoperatorSum(n, 4, [members for _, members in chain(n).groups(basis) if members])


@pytest.mark.parametrize(
    "shape", [(-1.0, 0.2, 0.0), (-3.0, 0.5, 4.0), (0.0, 0.0, 9.0), (-20.0, 0.0, 1.0), (-2.0, 2.0, 2.0)]
)
def test_faber_series_are_the_exponential_in_their_ellipse(shape: tuple[float, float, float]) -> None:
    ellipse = Ellipse.around(*shape)
    low, high, wide = shape
    corner = (np.array([low, high, high, (low + high) / 2]) + 1j * np.array([wide, wide, -wide, 0])).astype(
        complex
    )
    inside = (corner - ellipse.centre) / ellipse.gamma
    before, now, total = np.ones(4), inside, np.zeros(4, dtype=complex)
    for k, factor in enumerate(faber_coefficients(ellipse)):
        total += factor * (before if k == 0 else now)
        if k:
            twice = 2 if k == 1 else 1
            before, now = now, inside * now - twice * ellipse.delta / ellipse.gamma * before
    assert np.abs(total - np.exp(corner)).max() < 1e-14 * np.exp(max(ellipse.top, 0)) * 10


@pytest.mark.parametrize("weights", [(1.0, 1.2, 0.8), (1.0, 0.0, 30.0), (20.0, -15.0, 0.0), (0.0, 0.0, 0.0)])
def test_the_flow_is_the_exponential(weights: tuple[float, ...]) -> None:
    """Weak and strong damping, fast oscillations of either sign, and nothing at all; several series where it is long."""
    sums = operator(2)
    w, times = torch.tensor(weights, dtype=F64), [0.3, 1.1, 9.0]
    x = torch.randn(3, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    generator = torch.einsum("g,gij->ij", w, sums.dense())
    for t, found in zip(times, sums.flow(x, w, times), strict=True):
        expected = x @ torch.matrix_exp(t * generator).mT
        torch.testing.assert_close(found, expected, atol=1e-11 * float(x.norm()), rtol=0)


def test_derivatives_of_both_orders() -> None:
    sums = operator(2)

    def product(w: Tensor, x: Tensor) -> Tensor:
        return torch.stack(sums.flow(x.expand(2, 16), w, [0.4, 0.9]))[..., ::7]

    w = torch.tensor([[1.0, 1.2, 0.8], [0.7, -0.5, 0.1]], dtype=F64, requires_grad=True)
    x = torch.randn(16, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(product, (w, x.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda w: product(w, x.detach()), (w,))


def test_other_devices_take_the_same_products() -> None:
    """The products by gathering and adding, which devices other than the CPU use."""
    sums = operator(2)
    x = torch.randn(2, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    w = torch.tensor([[1.0, 1.2, 0.8], [0.7, -0.5, 0.1]], dtype=F64)
    for transposed in (False, True):
        here = sums.multiply(x, w, None, transposed)
        matrix = torch.einsum("bg,gij->bij", w, sums.dense())
        matrix = matrix.mT if transposed else matrix
        torch.testing.assert_close(here, torch.einsum("bij,bj->bi", matrix, x))
        torch.testing.assert_close(sums.gathered(x, w, transposed), here)
    torch.testing.assert_close(sums.pair(x, x), torch.einsum("bi,gij,bj->bg", x, sums.dense(), x))
    torch.testing.assert_close(sums.gathered_pair(x, x), sums.pair(x, x))


# ------------------------------------------------------------------ costs, by count


def test_a_generator_has_so_many_entries_for_each_site() -> None:
    """In frames it has 9 N + 1 a row; in products of Pauli matrices a Hamiltonian term has half a one."""
    for n in (3, 4, 5, 6):
        assert operator(n).num_entries <= 2 * n * 4**n


def applications(n: int, times: list[float], unit: float = 1.0, batch: int = 1) -> int:
    values = torch.full((batch,), 1.0 / unit, dtype=F64)
    slow = Lindbladian(
        n, [("0.5*field", "X", "all"), (0.5 / unit, "ZZ", ring(n))], [("decay", "sigma-", "all")]
    )
    law = Propagator(slow, Tetrahedral(), "up", [unit * t for t in times])
    law(field=values, decay=values)
    return law.operator.num_applications


def test_applications_grow_with_time_and_sites_and_not_with_the_times_asked_for() -> None:
    few = applications(4, [1.0])
    assert applications(4, [0.05 * k for k in range(1, 21)]) <= few + 1
    assert applications(4, [1.0], unit=1e-9) == few
    assert applications(4, [1.0], batch=5) == 5 * few
    # a fastest frequency of about two a site, and a constant for the last digits
    assert few < 2 * 4 * 2 + 40
    assert applications(6, [1.0]) < 2 * 6 * 2 + 40
    assert applications(4, [8.0]) < 8 * few


def test_inference_applies_the_generator_no_more_than_it_has_to() -> None:
    model = Lindbladian(4, [("g", "X", "all"), (0.5, "ZZ", ring(4))], [(0.4, "sigma-", "all")])
    records = simulate_records(model.bind(g=0.6), Tetrahedral(), "up", [0.5, 1.0], 300, generator=0)
    prior = {"g": dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0)}
    program = RecordModel(model, Tetrahedral(), "up", records.times, prior)
    with torch.no_grad():
        program.probabilities({"g": torch.tensor(0.6, dtype=F64)})
    once = program.propagator.operator.num_applications
    counted: list[int] = []
    kept = SuperoperatorSum.multiply

    def counting(self: SuperoperatorSum, x: Tensor, *rest: object) -> Tensor:
        counted.append(len(x))
        return kept(self, x, *rest)

    steps, draws = 3, 32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SuperoperatorSum, "multiply", counting)
        idata = infer_parameters(
            records, model, Tetrahedral(), "up", prior, steps=steps, num_draws=draws, progress=False
        )
    # a gradient for each particle and step, one density for each draw (replicated records take none of their own), and
    # some hundred for the mode, its curvature and the checks of shapes
    assert sum(counted) < once * (2 * 32 * steps + draws + 100)
    assert abs(float(idata.posterior["g"].mean()) - 0.6) < 5 * float(idata.posterior["g"].std())


def test_replicated_records_of_eight_qubits_repeat_no_table() -> None:
    """Two thousand records of two times among 65536 outcomes: a table for each would be a gigabyte."""
    p = torch.zeros(3, 1, 2, 4**8, dtype=F64)
    p[0, 0, 0, 7], p[1, 0, 0, 9], p[2, 0, 0, 11], p[:, 0, 1, 5] = 1.0, 1.0, 1.0, 1.0
    index = torch.tensor([0, 1]).repeat(1000)
    code = encode(RecordLaw(p, index, 8).sample((2,)), 4)
    assert code.shape == (2, 3, 2000)
    assert code[..., index == 1].unique().tolist() == [5]
    assert [code[:, k, index == 0].unique().tolist() for k in range(3)] == [[7], [9], [11]]


@pytest.mark.slow
def test_eight_qubits_within_minutes() -> None:
    """Two records of a thousand shots: the truth inside, and means that importance weights, which are exact, don't move."""
    model = Lindbladian(8, [("0.5*field", "X", "all"), (0.5, "ZZ", ring(8))], [("decay", "sigma-", "all")])
    truth = {"field": 1.2, "decay": 0.8}
    records = simulate_records(model.bind(**truth), Tetrahedral(), "up", [0.5, 1.5], 1000, generator=0)
    priors = {name: dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0) for name in truth}
    idata = infer_parameters(
        records, model, Tetrahedral(), "up", priors, num_draws=200, predictive=False, progress=False
    )
    assert idata.attrs["khat"] < 0.7
    weights = torch.softmax(torch.as_tensor(idata.sample_stats["log_weight"].values).flatten(), 0)
    for name, value in truth.items():
        draws = torch.as_tensor(idata.posterior[name].values).flatten()
        spread = float(draws.std())
        assert abs(float(draws.mean()) - value) < 4.5 * spread
        # the means of 200 draws, plain and weighted, differ by some 1/sqrt(200) of the spread and the guide's own error
        assert abs(float(draws.mean() - weights @ draws)) < 0.35 * spread
