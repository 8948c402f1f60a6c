"""Operators of the whole lattice taken apart: they add up again, and what isn't local is refused."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import LindbladianError, ShapeError, SystemSizeError
from stochdyn.povm import Lindbladian, Tetrahedral, named_operator, ring, systems
from stochdyn.povm.lindblad import local_parts, pauli_coefficients
from stochdyn.povm.master import full_operator

C128 = torch.complex128


def test_coefficients_are_traces() -> None:
    o = torch.randn(8, 8, dtype=C128)
    c = pauli_coefficients(o)
    for s in [(0, 0, 0), (1, 2, 3), (3, 0, 2)]:
        p = named_operator(" ".join("IXYZ"[i] for i in s))
        torch.testing.assert_close(c[s], torch.trace(p @ o) / 8)


def test_parts_add_up() -> None:
    h = torch.zeros(32, 32, dtype=C128)
    h3 = torch.randn(8, 8, dtype=C128)
    for matrix, sites in (
        (h3 + h3.mH, (3, 0, 2)),
        (named_operator("XY"), (4, 1)),
        (named_operator("Z"), (1,)),
    ):
        h += torch.from_numpy(full_operator(matrix, sites, 5, 2).toarray())
    parts = local_parts(h)
    total = sum(torch.from_numpy(full_operator(m, s, 5, 2).toarray()) for s, m in parts)
    identity = torch.eye(32, dtype=C128) * torch.trace(h) / 32
    torch.testing.assert_close(total + identity, h)
    assert max(len(s) for s, _ in parts) == 3
    ((sites, matrix),) = local_parts(h, together=True)
    assert sites == (0, 1, 2, 3, 4)
    torch.testing.assert_close(matrix, h)


def test_operators_of_qutip_solvers_are_models() -> None:
    qutip = pytest.importorskip("qutip")
    from stochdyn.povm.lindblad import to_qutip

    model = Lindbladian(
        4,
        [(0.5, "ZZ", ring(4)), (0.3, "X", "all"), (0.2, "XYZ", (0, 3, 1))],
        [(0.7, "sigma-", "all"), (0.4, torch.randn(4, 4, dtype=C128), (3, 1))],
    )
    h, collapse = to_qutip(model)
    again = Lindbladian.from_qutip(h, collapse)
    p = torch.rand(256, dtype=torch.float64)
    frame = Tetrahedral()
    torch.testing.assert_close(again.master_operator(frame).apply(p), model.master_operator(frame).apply(p))
    single = Lindbladian.from_qutip(h, collapse[0])
    assert len(single.jumps) == 1
    with pytest.raises(LindbladianError, match="different size"):
        Lindbladian.from_qutip(h, [qutip.sigmam()])
    with pytest.raises(LindbladianError, match="must be Qobj"):
        Lindbladian.from_qutip(h, [(1.0, qutip.sigmam(), 0)])
    spins = Lindbladian.from_qutip(qutip.tensor(qutip.jmat(1, "z"), qutip.jmat(1, "x")))
    assert (spins.dim, spins.num_sites, spins.bonds) == (3, 2, [(0, 1)])
    with pytest.raises(LindbladianError, match="same number of levels"):
        Lindbladian.from_qutip(qutip.tensor(qutip.jmat(1, "z"), qutip.sigmax()))


BAD = {
    "not of qubits": (lambda: pauli_coefficients(torch.eye(3)), ShapeError, r"\(2\*\*N, 2\*\*N\)"),
    "too large": (lambda: pauli_coefficients(torch.eye(2**11)), SystemSizeError, "11 sites"),
    "not local": (lambda: local_parts(named_operator("ZZZZZZ"), "h"), LindbladianError, "h isn't local"),
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


def test_the_ising_chain_comes_back() -> None:
    model = systems.ising(6)
    h = sum(x.coupling.factor * full_operator(x.matrix, x.sites, 6, 2) for x in model.hamiltonian)
    parts = local_parts(torch.from_numpy(h.toarray()))
    assert len(parts) == 12
