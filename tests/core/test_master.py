"""Master equations against dense matrices, matrix exponentials and the published numbers of a spin chain."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from stochdyn.core import (
    LearnedFlow,
    MatrixMasterEquation,
    SparseMasterEquation,
    all_configurations,
    decode,
    encode,
    unique_rows,
)
from stochdyn.errors import InvalidInputError, ShapeError

F64 = torch.float64


def generator(size: int) -> Tensor:
    """A random matrix with zero column sums and entries of both signs."""
    m = torch.randn(size, size, dtype=F64)
    return m - torch.diag(m.sum(0))


def rates(size: int) -> Tensor:
    """A random generator of a jump process."""
    m = torch.rand(size, size, dtype=F64)
    return m - torch.diag(m.sum(0))


def random_terms(q: int = 3) -> list[tuple[tuple[int, ...], Tensor]]:
    """Terms on one, two and three of four sites, out of order and overlapping."""
    return [
        ((2,), generator(q)),
        ((0, 1), generator(q**2)),
        ((3, 1), generator(q**2)),
        ((1, 3), generator(q**2)),
        ((3, 0, 2), generator(q**3)),
    ]


def dense_term(sites: tuple[int, ...], matrix: Tensor, n: int, q: int) -> Tensor:
    """One term as a full matrix, entry by entry from its definition."""
    a = all_configurations(n, q)
    rest = [i for i in range(n) if i not in sites]
    same = (a[:, None, rest] == a[None, :, rest]).all(-1)
    index = encode(a[:, list(sites)], q)
    return torch.where(same, matrix[index[:, None], index[None]], torch.zeros((), dtype=F64))


@pytest.fixture
def system() -> tuple[SparseMasterEquation, Tensor]:
    terms = random_terms()
    return SparseMasterEquation(4, 3, terms), sum(dense_term(s, m, 4, 3) for s, m in terms)  # type: ignore[return-value]


def test_apply_is_the_dense_product(system) -> None:
    operator, dense = system
    p = torch.rand(2, 5, 81, dtype=F64)
    torch.testing.assert_close(operator.apply(p), p @ dense.T)
    torch.testing.assert_close(operator.apply_adjoint(p), p @ dense)
    torch.testing.assert_close(operator.to_sparse().to_dense(), dense)


def test_terms_on_the_same_sites_are_merged_whatever_their_order(system) -> None:
    assert system[0].sites == [(2,), (0, 1), (1, 3), (0, 2, 3)]


def test_connected_lists_every_source_once(system) -> None:
    operator, dense = system
    a = all_configurations(4, 3)[torch.randperm(81)[:20]]
    b, r = operator.connected(a)
    assert torch.equal(b[:, 0], a)
    codes = encode(b, 3)
    assert all(len(set(row.tolist())) == row.numel() for row in codes)
    rebuilt = torch.zeros(20, 81, dtype=F64).scatter_add(1, codes, r)
    torch.testing.assert_close(rebuilt, dense[encode(a, 3)])


def test_mass_is_conserved(system) -> None:
    operator, _ = system
    p = torch.rand(81, dtype=F64)
    assert abs(float(operator.apply(p).sum())) < 1e-12
    assert float(operator.mass_defect()) < 1e-12


def test_local_rate_is_the_relative_rate_and_has_zero_mean(system) -> None:
    operator, dense = system
    p = torch.rand(81, dtype=F64)
    a = all_configurations(4, 3)
    seen: list[int] = []

    def log_prob(b: Tensor) -> Tensor:
        seen.append(b.shape[0])
        return p.log()[encode(b, 3)] + 3.0  # a constant is of no effect

    truth = (dense @ p) / p
    torch.testing.assert_close(operator.local_rate(log_prob, a), truth)
    assert seen == [81], "shared outcomes are evaluated once"
    torch.testing.assert_close(operator.local_rate(log_prob, a, deduplicate=False), truth)
    assert seen[1] > 1000
    seen.clear()
    torch.testing.assert_close(operator.local_rate(log_prob, a, chunk_size=20), truth)
    assert seen == [20, 20, 20, 20, 1]
    assert abs(float((p * truth).sum())) < 1e-12


def test_local_rate_is_differentiable_in_the_distribution(system) -> None:
    operator, dense = system
    logits = torch.randn(81, dtype=F64, requires_grad=True)
    a = all_configurations(4, 3)
    ours = operator.local_rate(lambda b: logits[encode(b, 3)], a).square().sum()
    truth = ((dense @ logits.exp()) / logits.exp()).square().sum()
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(truth, logits)[0])


def test_probabilities_below_the_smallest_float_are_no_obstacle() -> None:
    n, flip = 200, rates(4)
    operator = SparseMasterEquation(n, 4, [((i,), flip.float()) for i in range(n)])
    single = torch.tensor([0.4, 0.3, 0.2, 0.1])
    a = torch.randint(0, 4, (6, n))
    ours = operator.local_rate(lambda b: single.log()[b].sum(-1), a)
    assert torch.equal(single.log()[a].sum(-1).exp(), torch.zeros(6))
    per_site = (flip.float() @ single) / single
    torch.testing.assert_close(ours, per_site[a].sum(-1), rtol=1e-3, atol=1e-2)


def exponential_flow(dense: Tensor, p0: Tensor, q: int) -> LearnedFlow:
    """The exact solution, as a flow that autograd can differentiate in time."""

    def log_prob(t: Tensor, a: Tensor) -> Tensor:
        flat, where = torch.unique(t, return_inverse=True)
        # the matrix exponential of every distinct time; the derivative comes from L itself
        p = torch.stack([torch.matrix_exp(dense * s) @ p0 for s in flat])
        slope = p @ dense.T
        code, row = encode(a, q), where.reshape(a.shape[:-1])
        lag = (t.reshape(a.shape[:-1]) - flat[row].detach()) if t.requires_grad else 0.0
        return (p[row, code].detach() + lag * slope[row, code].detach()).log()

    return LearnedFlow(log_prob)


def test_exact_evolution_has_no_residual_and_agrees_with_scipy() -> None:
    terms = [((0,), rates(3)), ((0, 1), rates(9)), ((1, 2), rates(9))]
    operator = SparseMasterEquation(3, 3, terms)
    dense = sum(dense_term(s, m, 3, 3) for s, m in terms)
    p0 = torch.rand(27, dtype=F64).softmax(0)
    p, h = p0, 0.01
    for _ in range(50):  # classical Runge-Kutta with the matrix-free product
        k1 = operator.apply(p)
        k2 = operator.apply(p + h / 2 * k1)
        k3 = operator.apply(p + h / 2 * k2)
        k4 = operator.apply(p + h * k3)
        p = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    truth = scipy.linalg.expm(0.5 * dense.numpy()) @ p0.numpy()
    np.testing.assert_allclose(p.numpy(), truth, atol=1e-7)
    assert abs(float(p.sum()) - 1) < 1e-13
    flow, a = exponential_flow(dense, p0, 3), all_configurations(3, 3)
    assert float(operator.residual(flow, 0.5, a).detach().abs().max()) < 1e-10
    each = torch.linspace(0.1, 1, 27, dtype=F64)[:, None]
    assert float(operator.residual(flow, each, a).detach().abs().max()) < 1e-10
    stationary = operator.residual(flow, 0.5, a, stationary=True).detach()
    np.testing.assert_allclose(stationary.numpy(), -(dense.numpy() @ truth) / truth, atol=1e-6)


def test_residual_of_a_wrong_flow_is_the_missing_rate() -> None:
    operator = MatrixMasterEquation(rates(5))
    uniform = LearnedFlow(lambda t, a: 2.0 * t[..., 0])
    a = torch.arange(5)[:, None]
    truth = 2.0 - operator.apply(torch.ones(5, dtype=F64))
    torch.testing.assert_close(operator.residual(uniform, torch.tensor(0.3, dtype=F64), a), truth)


def test_coefficients_depend_on_time() -> None:
    one, two = generator(2), generator(4)
    operator = SparseMasterEquation(
        2,
        2,
        [((0,), one), ((0, 1), two)],
        lambda t: torch.cat([t.cos(), t], -1) if t.ndim else torch.stack([t.cos(), t]),
    )
    p, t = torch.rand(4, dtype=F64), 0.7
    eye = torch.eye(2, dtype=F64)
    dense = np.cos(t) * torch.kron(one, eye) + t * two
    torch.testing.assert_close(operator.apply(p, t), dense @ p)
    torch.testing.assert_close(operator.to_sparse(t).to_dense(), dense)
    a, times = all_configurations(2, 2), torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=F64)
    b, each = operator.connected(a, times)
    for i in range(4):
        torch.testing.assert_close(each[i], operator.connected(a[i : i + 1], times[i, 0])[1][0])
    with pytest.raises(InvalidInputError, match="depends on time"):
        operator.apply(p)
    assert b.shape[:2] == each.shape


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_one_matrix_in_any_layout(layout: str) -> None:
    dense = torch.where(torch.rand(6, 6) < 0.4, torch.rand(6, 6, dtype=F64), torch.zeros((), dtype=F64))
    dense = dense - torch.diag(dense.sum(0))
    given = {"dense": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]
    operator = MatrixMasterEquation(given)
    p = torch.rand(3, 6, dtype=F64)
    torch.testing.assert_close(operator.apply(p), p @ dense.T)
    torch.testing.assert_close(operator.to_sparse().to_dense(), dense)
    torch.testing.assert_close(
        operator.local_rate(lambda a: p[0].log()[a[:, 0]], torch.arange(6)[:, None]), (dense @ p[0]) / p[0]
    )


def test_trapezoid_residual_vanishes_for_its_own_step(system) -> None:
    operator, dense = system
    p0, h, eye = torch.rand(81, dtype=F64) + 1, 0.02, torch.eye(81, dtype=F64)
    p1 = torch.linalg.solve(eye - h / 2 * dense, (eye + h / 2 * dense) @ p0)
    assert float(operator.trapezoid_residual(p0, p1, h).abs().max()) < 1e-12
    other = torch.rand(81, dtype=F64) + 1
    full = operator.trapezoid_residual(p0, other, h)
    a = all_configurations(4, 3)
    ratio = operator.trapezoid_ratio(
        lambda b: p0.log()[encode(b, 3)], lambda b: other.log()[encode(b, 3)], a, h
    )
    torch.testing.assert_close(ratio, full / other)
    torch.testing.assert_close(operator.vector_residual(other, p0), p0 - dense @ other)
    torch.testing.assert_close(operator.vector_residual(other), -dense @ other)


# ---- a spin chain, in the probabilities of tetrahedral measurements -----------------------

PAULI = [
    np.array([[0, 1], [1, 0]], dtype=complex),
    np.array([[0, -1j], [1j, 0]]),
    np.array([[1, 0], [0, -1]], dtype=complex),
]
CORNERS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
EFFECTS = [(np.eye(2) + sum(c * s for c, s in zip(v, PAULI, strict=True))) / 4 for v in CORNERS]
DUAL = [6 * m - np.eye(2) for m in EFFECTS]


def local_generator(lindblad, k: int) -> Tensor:
    """L_ab = Tr(M_a Lindblad(N_b)) on k sites."""
    frames = [
        [reduce(np.kron, [f[i] for i in string]) for string in all_configurations(k, 4).tolist()]
        for f in (EFFECTS, DUAL)
    ]
    entries = [[np.trace(m @ lindblad(n)).real for n in frames[1]] for m in frames[0]]
    return torch.tensor(np.array(entries))


def ising(n: int, field: float, coupling: float = 2.0) -> SparseMasterEquation:
    """H = (V/4) sum ZZ + (g/2) sum X on a ring, with decay at rate 1."""
    x, y, z = PAULI
    lower = (x - 1j * y) / 2

    def one(r):
        h, number = field / 2 * x, lower.conj().T @ lower
        return -1j * (h @ r - r @ h) + lower @ r @ lower.conj().T - 0.5 * (number @ r + r @ number)

    def two(r):
        h = coupling / 4 * np.kron(z, z)
        return -1j * (h @ r - r @ h)

    site, bond = local_generator(one, 1), local_generator(two, 2)
    bond = torch.where(bond.abs() < 1e-14, torch.zeros_like(bond), bond)
    return SparseMasterEquation(
        n, 4, [((i,), site) for i in range(n)] + [((i, (i + 1) % n), bond) for i in range(n)]
    )


def test_spin_chain_has_the_known_number_of_connected_outcomes() -> None:
    operator = ising(6, 1.0)
    _, entries = operator.connected(all_configurations(6, 4)[:50])
    assert torch.equal((entries.abs() > 1e-14).sum(1), torch.full((50,), 9 * 6 + 1))


def test_spin_chain_reaches_the_known_steady_state() -> None:
    n, operator = 4, ising(4, 1.0)
    dense = operator.to_sparse().to_dense()
    rhs = torch.zeros(256, dtype=F64)
    rhs[-1] = 1.0
    p = torch.linalg.solve(torch.cat([dense[:-1], torch.ones(1, 256, dtype=F64)]), rhs)
    assert float(operator.vector_residual(p).abs().max()) < 1e-14
    a = operator.configurations()
    coefficients = 3**0.5 * torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=F64)
    found = torch.stack([(p[:, None] * c[a]).sum(0).mean() for c in coefficients])
    truth = torch.tensor([0.4397813, 0.1871861, -0.8128139], dtype=F64)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-7)
    assert n == operator.num_sites


def test_trapezoid_steps_have_the_known_accuracy() -> None:
    operator = ising(4, 1.0)
    dense = operator.to_sparse().to_dense()
    up = torch.tensor([np.trace(m @ np.diag([1.0, 0.0])).real for m in EFFECTS])
    p0 = up[operator.configurations()].prod(-1)
    truth = torch.matrix_exp(dense) @ p0
    eye, distances = torch.eye(256, dtype=F64), []
    for tau, steps in ((0.1, 5), (0.05, 10), (0.025, 20)):
        step = torch.linalg.solve(eye - tau * dense, eye + tau * dense)
        p = torch.linalg.matrix_power(step, steps) @ p0
        assert float(operator.trapezoid_residual(p, step @ p, 2 * tau).abs().max()) < 1e-13
        distances.append(0.5 * float((p - truth).abs().sum()))
    np.testing.assert_allclose(distances, [7.0e-3, 1.7e-3, 4.3e-4], rtol=0.03)


# ---- outcomes ----------------------------------------------------------------------


def test_encode_and_decode_are_inverse() -> None:
    a = all_configurations(3, 5)
    assert torch.equal(encode(a, 5), torch.arange(125))
    assert torch.equal(decode(torch.arange(125), 3, 5), a)


@pytest.mark.parametrize("sites", [5, 60])
def test_unique_rows_rebuild_the_input(sites: int) -> None:
    a = torch.randint(0, 4, (10, sites))[torch.randint(0, 10, (50,))]
    unique, index = unique_rows(a, 4)
    assert unique.shape[0] <= 10
    assert torch.equal(unique[index], a)


def test_module_apply_still_walks_modules(system) -> None:
    seen: list[object] = []
    system[0].apply(seen.append)
    assert seen == [system[0]]


def test_moving_precision_moves_all_tables(system) -> None:
    operator = system[0].float()
    _, r = operator.connected(torch.zeros(1, 4, dtype=torch.long))
    assert r.dtype == torch.float32


def test_bad_input_raises() -> None:
    good = generator(2)
    with pytest.raises(InvalidInputError, match="columns of a master operator must sum to zero"):
        SparseMasterEquation(2, 2, [((0,), torch.eye(2))])
    with pytest.raises(InvalidInputError, match="columns of a master operator"):
        MatrixMasterEquation(good.T)
    with pytest.raises(ShapeError, match="doesn't fit its sites"):
        SparseMasterEquation(2, 2, [((0, 1), good)])
    for sites in ((2,), (-1,), ()):
        with pytest.raises(InvalidInputError, match="distinct sites"):
            SparseMasterEquation(2, 2, [(sites, good)])
    with pytest.raises(InvalidInputError, match="distinct sites"):
        SparseMasterEquation(2, 2, [((0, 0), generator(4))])
    with pytest.raises(ShapeError, match="square"):
        MatrixMasterEquation(torch.zeros(2, 3))
    operator = SparseMasterEquation(3, 2, [((0,), good)])
    with pytest.raises(ShapeError, match=r"q\*\*N entries"):
        operator.apply(torch.zeros(4, dtype=F64))
    with pytest.raises(InvalidInputError, match="must be integers"):
        operator.connected(torch.zeros(2, 3))
    with pytest.raises(ShapeError, match=r"outcomes must be \(n, N\)"):
        operator.connected(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="unknown option"):
        operator.residual(
            LearnedFlow(lambda t, a: a.sum(-1)), 0.0, torch.zeros(2, 3, dtype=torch.long), form="log"
        )
    with pytest.raises(InvalidInputError, match="too many outcomes to list"):
        SparseMasterEquation(40, 2, [((0,), good)]).configurations()


def test_coefficients_may_be_a_tensor_and_keep_its_gradient() -> None:
    terms = [((0,), generator(2)), ((1,), generator(2)), ((0, 1), generator(4))]
    p = torch.rand(4, dtype=F64)
    a = all_configurations(2, 2)

    def rates_of(factors: Tensor) -> tuple[Tensor, Tensor]:
        operator = SparseMasterEquation(2, 2, terms, factors)
        b, r = operator.connected(a)
        return operator.apply(p), (r * p[encode(b, 2)]).sum(1)

    factors = torch.tensor([0.5, 2.0, -1.0], dtype=F64, requires_grad=True)
    change, same = rates_of(factors)
    scaled = SparseMasterEquation(
        2, 2, [(s, f * m) for (s, m), f in zip(terms, factors.detach(), strict=True)]
    )
    torch.testing.assert_close(change, scaled.apply(p))
    torch.testing.assert_close(change, same)
    assert torch.autograd.gradcheck(rates_of, factors)
    with pytest.raises(ShapeError, match="one coefficient per term"):
        SparseMasterEquation(2, 2, terms, torch.ones(2))
