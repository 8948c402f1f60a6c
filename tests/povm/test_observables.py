"""Observables: estimators on density matrices, on all probabilities and on samples agree; input is checked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import decode
from stochdyn.errors import InvalidInputError, LindbladianError, ShapeError, TooFewDrawsError
from stochdyn.povm import (
    FourPauli,
    QutritSIC,
    SiteFrames,
    Tetrahedral,
    correlations,
    exact,
    named_operator,
    observable,
    observables,
    ring,
    structure_factor,
    systems,
)
from stochdyn.povm.frames import partial_trace, probabilities_of

F64, C128 = torch.float64, torch.complex128
N = 4
POVMS = [
    Tetrahedral(),
    FourPauli(),
    SiteFrames([Tetrahedral(), FourPauli(), Tetrahedral(rotated=False), FourPauli()]),
]


def random_state(size: int) -> Tensor:
    m = torch.randn(size, size, dtype=C128)
    rho = m @ m.mH
    return rho / rho.diagonal().sum()


def kron(*names: str) -> Tensor:
    return named_operator(" ".join(names))


M2 = torch.tensor([[0.3, 0, 0, 1j], [0, -1, 0.5, 0], [0, 0.5, 2, 0], [-1j, 0, 0, 0.1]], dtype=C128)
CASES = {
    "Z": ("Z", sum(kron(*["Z" if i == j else "I" for j in range(N)]) for i in range(N)) / N),
    "one site": (("X", 2), kron("I", "I", "X", "I")),
    "ring of bonds": (("XY", ring(4)), (kron("X", "Y", "I", "I") + kron("I", "X", "Y", "I")
                                        + kron("I", "I", "X", "Y") + kron("Y", "I", "I", "X")) / 4),
    "bonds of the model": ("ZZ", (kron("Z", "Z", "I", "I") + kron("Z", "I", "I", "Z")) / 2),
    "out of order": (("XYZ", (3, 0, 2)), kron("Y", "I", "Z", "X")),
    "all sites": (("XYZX", (0, 1, 2, 3)), kron("X", "Y", "Z", "X")),
    "a matrix": ((M2, (1, 2)), torch.kron(torch.kron(torch.eye(2, dtype=C128), M2), torch.eye(2, dtype=C128))),
    "a projector": (("P0 P1", (0, 1)), kron("P0", "P1", "I", "I")),
    "a list": ((["Z", named_operator("X")], (0, 3)), kron("Z", "I", "I", "X")),
}  # fmt: skip


CASES |= {
    "all by name": (("P1", "all"), sum(kron(*["P1" if i == j else "I" for j in range(N)]) for i in range(N)) / N),
    "an energy": ([(0.5, "ZZ", [(0, 1), (2, 1)]), ([1.0, -1.0, 2.0, 0.5], "X", "all")],
                  0.5 * (kron("Z", "Z", "I", "I") + kron("I", "Z", "Z", "I")) + kron("X", "I", "I", "I")
                  - kron("I", "X", "I", "I") + 2 * kron("I", "I", "X", "I") + 0.5 * kron("I", "I", "I", "X")),
    "a current": ([(1j, "sigma+ sigma-", (0, 2)), (-1j, "sigma- sigma+", (0, 2))],
                  1j * kron("sigma+", "I", "sigma-", "I") - 1j * kron("sigma-", "I", "sigma+", "I")),
    "a coherence": (("sigma-", 1), kron("I", "sigma-", "I", "I")),
    "an array of sites": (("ZX", torch.tensor([3, 1])), kron("I", "X", "I", "Z")),
    "a structure factor": (structure_factor("X", 0.7, N), sum(
        torch.exp(torch.tensor(0.7j * (i - j), dtype=C128)) / N
        * kron(*["X" if k == i else "I" for k in range(N)]) @ kron(*["X" if k == j else "I" for k in range(N)])
        for i in range(N) for j in range(N))),
}  # fmt: skip


@pytest.mark.parametrize("povm", POVMS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_means_are_those_of_the_density_matrix(povm, case) -> None:
    o = observable(case[0], N, bonds=[(0, 1), (0, 3)])
    rho = random_state(2**N)
    exact = complex(torch.trace(rho @ case[1].to(C128)))
    assert abs(complex(o.expectation(rho)) - exact) < 1e-11
    p = probabilities_of(rho, [povm.at(i) for i in range(N)])
    assert abs(complex(o.mean(povm, p)) - exact) < 1e-11
    assert o.is_hermitian == torch.allclose(case[1], case[1].mH)
    assert o.mean(povm, p).is_complex() != o.is_hermitian


def test_estimates_scatter_as_their_errors_say() -> None:
    povm, rho = Tetrahedral(), random_state(2**N)
    p = povm.probabilities(rho)
    generator = torch.Generator().manual_seed(1)
    for spec in ("Z", ("XZ", ring(4))):
        o = observable(spec, N)
        exact, values = float(o.mean(povm, p)), []
        for _ in range(200):
            a = decode(torch.multinomial(p, 200, True, generator=generator), N, 4)
            e = o.estimate(povm, a)
            values.append((float(e.mean) - exact) / float(e.stderr))
        z = torch.tensor(values)
        # mean and variance of 200 standard normal numbers, at 4.5 standard errors
        assert abs(float(z.mean())) < 4.5 / 200**0.5
        assert abs(float(z.var()) - 1) < 4.5 * (2 / 200) ** 0.5


def test_site_averages_count_correlations() -> None:
    """A site average of a state in which all sites agree doesn't gain from the number of sites."""
    povm = Tetrahedral()
    ghz = torch.zeros(4, dtype=C128)
    ghz[0] = ghz[3] = 0.5**0.5
    p = povm.probabilities(ghz)
    a = decode(torch.multinomial(p, 40_000, True), 2, 4)
    stderr = float(observable("Z", 2).estimate(povm, a).stderr) * 200
    # Var((z1 + z2) / 2) = (3 + <ZZ>) / 2 = 2; the variance's own error is about 1 %
    assert abs(stderr**2 - 2) < 0.1


def test_partial_traces() -> None:
    rho = torch.kron(torch.kron(a := random_state(2), b := random_state(2)), c := random_state(2))
    torch.testing.assert_close(partial_trace(rho, (2, 0)), torch.kron(c, a))
    torch.testing.assert_close(partial_trace(torch.stack([rho, rho]), (1,))[1], b)
    with pytest.raises(ShapeError, match="power of 2"):
        partial_trace(torch.eye(3), [0])
    with pytest.raises(LindbladianError, match="doesn't exist"):
        partial_trace(torch.eye(4), [2])


def test_three_levels() -> None:
    rho = random_state(9)
    frame = QutritSIC()
    o = observable("Sz", 2, dim=3)
    assert abs(float(o.mean(frame, frame.probabilities(rho))) - float(o.expectation(rho))) < 1e-12
    o = observable(("Sx Sy", (1, 0)), 2, dim=3)
    assert abs(float(o.mean(frame, frame.probabilities(rho))) - float(o.expectation(rho))) < 1e-12


def test_sums_and_multiples() -> None:
    rho = random_state(2**N)
    a, b = observable("Z", N), observable(("XY", (2, 0)), N)
    both = 2 * a - b
    assert (
        abs(float(both.expectation(rho)) - 2 * float(a.expectation(rho)) + float(b.expectation(rho))) < 1e-12
    )
    names = correlations("X", "Y", N)
    assert len(names) == N * (N - 1)
    assert float(observable(names["X1 Y3"], N).expectation(rho)) == pytest.approx(
        float(observable(("XY", (1, 3)), N).expectation(rho))
    )


def test_names() -> None:
    assert list(observables(["X", "Z"], 3)) == ["X", "Z"]
    named = observables({"m": "Z", "c": ("ZZ", (0, 2))}, 3)
    assert named["c"].places == ((0, 2),)
    assert observable(named["c"], 3) is named["c"]


BAD = {
    "a missing site": (lambda: observable(("Z", 5), 4), LindbladianError, "doesn't exist; got 5; expected sites 0 to 3"),
    "a negative site": (lambda: observable(("ZZ", (0, -1)), 4), LindbladianError, "doesn't exist"),
    "a site twice": (lambda: observable(("ZZ", (1, 1)), 4), LindbladianError, "twice"),
    "too few sites": (lambda: observable(("ZZ", (1,)), 4), InvalidInputError, r"acts on 2 site\(s\)"),
    "no sites": (lambda: observable("ZZ", 4), InvalidInputError, "needs sites"),
    "no sites at all": (lambda: observable(("Z", []), 4), InvalidInputError, "no sites"),
    "coefficients of other length": (
        lambda: observable([([1.0, 2.0], "Z", "all")], 4), InvalidInputError, "got 2 for 4 places"),
    "an infinite coefficient": (lambda: observable([(float("inf"), "Z", 0)], 4), InvalidInputError, "finite"),
    "a sum as a name": (lambda: observable("XX+YY", 4), InvalidInputError, "product, not a sum"),
    "one observable for a list": (lambda: observables(("ZZ", (0, 3)), 4), InvalidInputError, "alone is"),
    "a wave vector of two axes": (lambda: structure_factor("Z", [0.0, 1.0], 4), InvalidInputError, "each axis"),
    "a structure factor of no observable": (lambda: structure_factor("sigma-", 0.0, 4), InvalidInputError, "Hermitian"),
    "another lattice": (lambda: observable(observable("Z", 3), 4), InvalidInputError, "another lattice"),
    "not a listing": (lambda: observables("Z", 4), InvalidInputError, "mapping or a list"),
    "outcomes of another size": (
        lambda: observable("Z", 3).estimator(POVMS[0])(torch.zeros(2, 4, dtype=torch.long)), ShapeError, r"got \(4,\)"),
    "one sample": (
        lambda: observable("Z", 3).estimate(POVMS[0], torch.zeros(1, 3, dtype=torch.long)), TooFewDrawsError, "two"),
    "a matrix of another size": (lambda: observable("Z", 3).expectation(torch.eye(4)), ShapeError, "expected 8"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


def test_correlations_of_operators_are_those_of_their_names() -> None:
    model = systems.ising(3)
    named = exact.evolve(
        model, "up", [0.0, 0.7], correlations("sigma+", "sigma-", 3), backend="matrix"
    ).expect
    given = correlations(named_operator("sigma+"), named_operator("sigma-"), 3)
    assert list(given) == ["A0 B1", "A0 B2", "A1 B0", "A1 B2", "A2 B0", "A2 B1"]
    found = exact.evolve(model, "up", [0.0, 0.7], given, backend="matrix").expect
    for a, b in zip(named.values(), found.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    z = named_operator("Z")
    assert list(correlations(z, z, 3)) == ["A0 A1", "A0 A2", "A1 A2"]
    assert list(correlations("Z", z, 2)) == ["Z0 B1", "Z1 B0"]
