"""Lindbladians: published local matrices, the master equation against the density matrix, counts of neighbours."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch
from torch import Tensor

from stochdyn.core import all_configurations, encode
from stochdyn.errors import InvalidInputError, LindbladianError, ShapeError, UnknownSiteError
from stochdyn.povm import (
    AutoregressiveTransformer,
    FourPauli,
    Frame,
    Lindbladian,
    QutritSIC,
    SiteFrames,
    Tetrahedral,
    evolve,
    exact,
    mean_field,
    named_operator,
    ring,
    spin_matrices,
)
from stochdyn.povm.frames import density_of, probabilities_of
from stochdyn.povm.lindblad import hamiltonian_matrix, jump_matrix

F64, C128 = torch.float64, torch.complex128
QUBIT = [Tetrahedral(), Tetrahedral(rotated=False), FourPauli()]


def ids(frame: Frame) -> str:
    return frame.name


def embed(matrix: Tensor, sites: tuple[int, ...], n: int, d: int = 2) -> Tensor:
    """An operator on some sites as one on all of them."""
    rest = [i for i in range(n) if i not in sites]
    full = torch.kron(matrix.contiguous(), torch.eye(d ** len(rest), dtype=C128)).reshape([d] * (2 * n))
    place = [[*sites, *rest].index(i) for i in range(n)]
    return full.permute([*place, *(n + p for p in place)]).reshape(d**n, d**n)


def lindblad(model: Lindbladian, rho: Tensor, t: float = 0.0) -> Tensor:
    """The right-hand side for a density matrix, from its definition."""
    n, d = model.num_sites, model.dim

    def value(coupling) -> float:
        return coupling.factor * (1.0 if coupling.function is None else float(coupling.function(t)))

    h = sum(
        (value(x.coupling) * embed(x.matrix, x.sites, n, d) for x in model.hamiltonian),
        torch.zeros(d**n, d**n),
    )
    out = -1j * (h @ rho - rho @ h)
    for x in model.jumps:
        c = embed(x.matrix, x.sites, n, d)
        cc = c.mH @ c
        out = out + value(x.coupling) * (c @ rho @ c.mH - 0.5 * (cc @ rho + rho @ cc))
    return out


def random_state(size: int) -> Tensor:
    m = torch.randn(size, size, dtype=C128)
    rho = m @ m.mH
    return rho / rho.diagonal().sum()


R3 = 2 / math.sqrt(3)
RU = math.sqrt(1.5)
S, T = 0.40824829046386301, 0.81649658092772603
PUBLISHED = {
    ("aligned", "decay"): [[-1, 0, 0, 0], [1 / 3, -1 / 3, 1 / 6, 1 / 6], [1 / 3, 1 / 6, -1 / 3, 1 / 6],
                           [1 / 3, 1 / 6, 1 / 6, -1 / 3]],
    ("aligned", "Z"): [[0, 0, 0, 0], [0, 0, -R3, R3], [0, R3, 0, -R3], [0, -R3, R3, 0]],
    ("aligned", "X"): [[0, 0, RU, -RU], [0, 0, -S, S], [-RU, S, 0, T], [RU, -S, -T, 0]],
    ("aligned", "dephasing"): [[0, 0, 0, 0], [0, -4 / 3, 2 / 3, 2 / 3], [0, 2 / 3, -4 / 3, 2 / 3],
                               [0, 2 / 3, 2 / 3, -4 / 3]],
    ("rotated", "X"): [[0, 0, 1, -1], [0, 0, -1, 1], [-1, 1, 0, 0], [1, -1, 0, 0]],
    ("rotated", "Z"): [[0, 1, -1, 0], [-1, 0, 0, 1], [1, 0, 0, -1], [0, -1, 1, 0]],
    ("rotated", "dephasing"): [[-1, 0, 0, 1], [0, -1, 1, 0], [0, 1, -1, 0], [1, 0, 0, -1]],
    ("rotated", "decay"): [[-0.644338, 0.105662, 0.105662, -0.144338], [0.394338, -0.355662, 0.144338, 0.394338],
                           [0.394338, 0.144338, -0.355662, 0.394338], [-0.144338, 0.105662, 0.105662, -0.644338]],
    ("four", "decay"): [[-1, 0, 0, 0], [1 / 12, -5 / 12, 1 / 12, 1 / 12], [1 / 12, 1 / 12, -5 / 12, 1 / 12],
                        [5 / 6, 1 / 3, 1 / 3, -1 / 6]],
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_local_matrices_are_the_published_ones(case: tuple[str, str]) -> None:
    frame = {"rotated": QUBIT[0], "aligned": QUBIT[1], "four": QUBIT[2]}[case[0]]
    operator = {"decay": "sigma-", "dephasing": "Z"}.get(case[1], case[1])
    kind = jump_matrix if case[1] in ("decay", "dephasing") else hamiltonian_matrix
    expected = torch.tensor(PUBLISHED[case], dtype=F64)
    torch.testing.assert_close(kind(named_operator(operator), [frame]), expected, atol=6e-7, rtol=0)


def everything(n: int = 4) -> Lindbladian:
    """Terms of one, two and three sites, out of order, with general jumps."""
    h3 = torch.randn(8, 8, dtype=C128)
    return Lindbladian(
        n,
        [
            (0.7, "ZZ", ring(n)),
            ([0.1, 0.2, 0.3, 0.4], "X", "all"),
            (0.4, h3 + h3.mH, (2, 0, 3)),
            (1.3, "XY", (3, 1)),
            (-0.5, "Y", 2),
        ],
        [
            (1.0, "sigma-", "all"),
            (0.3, torch.randn(4, 4, dtype=C128), (1, 0)),
            (0.2, torch.randn(8, 8, dtype=C128), (1, 3, 2)),
            (0.6, torch.randn(2, 2, dtype=C128), 3),
        ],
    )


@pytest.mark.parametrize(
    "povm", [*QUBIT, SiteFrames([QUBIT[0], QUBIT[2], QUBIT[1], QUBIT[2]])], ids=lambda f: f.name
)
def test_the_master_equation_is_the_lindblad_equation(povm) -> None:
    model = everything()
    frames = [povm.at(i) for i in range(4)]
    rho = random_state(16)
    operator = model.master_operator(povm)
    change = operator.apply(probabilities_of(rho, frames))
    expected = probabilities_of(lindblad(model, rho), frames)
    torch.testing.assert_close(change, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(density_of(change, frames), lindblad(model, rho), atol=1e-10, rtol=0)
    assert float(operator.mass_defect()) < 1e-11


@pytest.mark.parametrize("povm", QUBIT, ids=ids)
def test_connected_configurations_give_the_same_rows(povm: Frame) -> None:
    operator = everything().master_operator(povm)
    a = all_configurations(4, 4)[torch.randperm(256)[:30]]
    b, rates = operator.connected(a)
    codes = encode(b, 4)
    assert all(row.unique().numel() == row.numel() for row in codes), "a configuration comes twice"
    p = torch.rand(256, dtype=F64)
    torch.testing.assert_close((rates * p[codes]).sum(1), operator.apply(p)[encode(a, 4)])


def test_three_levels() -> None:
    s = spin_matrices(3)
    model = Lindbladian(2, [(0.5, torch.kron(s["Sz"], s["Sz"]), (0, 1)), (0.3, "Sx", "all")],
                        [(0.8, "S-", "all"), (0.1, "Sz", 1)], dim=3)  # fmt: skip
    frame = QutritSIC()
    rho = random_state(9)
    change = model.master_operator(frame).apply(frame.probabilities(rho))
    torch.testing.assert_close(frame.reconstruct(change), lindblad(model, rho), atol=1e-12, rtol=0)


def test_an_overcomplete_frame_follows_the_lindblad_equation() -> None:
    states = torch.stack([QUBIT[0].effects, QUBIT[1].effects]).flatten(0, 1) / 2
    frame = Frame(states)
    model = Lindbladian(2, [(0.5, "ZZ", (0, 1)), (0.3, "X", "all")], [(0.8, "sigma-", "all")])
    rho = random_state(4)
    operator = model.master_operator(frame)
    change = operator.apply(frame.probabilities(rho))
    torch.testing.assert_close(
        change, probabilities_of(lindblad(model, rho), [frame] * 2), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(("frame", "mean"), [(QUBIT[0], 9), (QUBIT[1], 6.125), (QUBIT[2], 7.46875)])
def test_neighbours_of_the_ising_ring_are_counted_as_published(frame, mean) -> None:
    """Published, besides the configuration itself: 9, 6.1 and 7.6 a site."""
    n = 6
    model = Lindbladian(n, [(0.5, "ZZ", ring(n)), (0.5, "X", "all")], [(1.0, "sigma-", "all")])
    operator = model.master_operator(frame)
    b, rates = operator.connected(all_configurations(n, 4))
    assert b.shape[1] <= 12 * n + 1
    assert abs(float((rates != 0).sum(1).double().mean()) - (mean * n + 1)) < 1e-9
    assert len(operator.sites) == n, "one-site terms are absorbed by bonds"


def test_the_spectrum_of_a_small_system_is_that_of_the_lindbladian() -> None:
    model = everything()
    identity = torch.eye(256, dtype=C128).reshape(256, 16, 16)
    dense = torch.stack([lindblad(model, e).flatten() for e in identity], 1)
    mine = torch.linalg.eigvals(model.master_operator(Tetrahedral()).to_sparse().to_dense())
    theirs = torch.linalg.eigvals(dense)
    distance = (mine[:, None] - theirs[None]).abs()
    assert float(distance.min(0).values.max()) < 1e-8
    assert float(distance.min(1).values.max()) < 1e-8


def test_functions_of_time_are_evaluated_and_not_rebuilt() -> None:
    model = Lindbladian(
        3,
        [
            (lambda t: torch.cos(torch.as_tensor(t, dtype=F64)), "ZZ", ring(3)),
            (0.7, "X", "all"),
            (lambda t: t**2, "Y", 1),
        ],
        [(lambda t: 1 + t, "sigma-", "all")],
    )
    assert model.is_time_dependent
    frame = Tetrahedral()
    operator = model.master_operator(frame)
    rho = random_state(8)
    p = frame.probabilities(rho)
    for t in (0.0, 0.4, 1.3):
        change = probabilities_of(lindblad(model, rho, t), [frame] * 3)
        torch.testing.assert_close(operator.apply(p, t), change, atol=1e-12, rtol=0)
    a = all_configurations(3, 4)
    times = torch.rand(64, 1, dtype=F64)
    _, rates = operator.connected(a, times)
    for i in (0, 17, 63):
        row = operator.connected(a[i : i + 1], float(times[i]))[1]
        torch.testing.assert_close(rates[i], row[0])
    with pytest.raises(InvalidInputError, match="depends on time"):
        operator.apply(p)


def test_parameters_are_bound_and_keep_their_gradient() -> None:
    model = Lindbladian(2, [("g", "X", "all"), ("0.5*V", "ZZ", (0, 1))], [("decay", "sigma-", "all")])
    assert model.parameters == ("g", "V", "decay")
    frame = Tetrahedral()
    p = frame.probabilities(random_state(4))
    fixed = model.bind(g=0.3, V=1.0, decay=0.8).master_operator(frame)
    plain = Lindbladian(2, [(0.3, "X", "all"), (0.5, "ZZ", (0, 1))], [(0.8, "sigma-", "all")])
    torch.testing.assert_close(fixed.apply(p), plain.master_operator(frame).apply(p))

    def change(g: Tensor, decay: Tensor) -> Tensor:
        return model.bind(g=g, V=1.0, decay=decay).master_operator(frame).apply(p)

    values = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.3, 0.8)]
    assert torch.autograd.gradcheck(change, values)
    with pytest.raises(LindbladianError, match="bound first"):
        model.bind(g=1.0).master_operator(frame)
    with pytest.raises(UnknownSiteError, match="no parameter 'h'"):
        model.bind(h=1.0)
    with pytest.raises(LindbladianError, match="rate is negative"):
        model.bind(decay=-1.0)


def test_bonds_are_the_pairs_that_terms_couple() -> None:
    assert Lindbladian(3, [(1.0, "ZZ", ring(3)), (1.0, "XX", (1, 0))]).bonds == [(0, 1), (1, 2), (0, 2)]


def test_an_empty_list_of_bonds_is_no_term() -> None:
    model = Lindbladian(1, [(0.5, "ZZ", []), (1.0, "X", "all")])
    assert [term.sites for term in model.terms] == [(0,)]


H = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
BAD = {
    "a non-Hermitian term": (lambda: Lindbladian(2, [(1.0, H, 0)]), LindbladianError, "term 0 isn't Hermitian"),
    "a complex coefficient": (lambda: Lindbladian(2, [(1j, "X", 0)]), LindbladianError, "real and finite"),
    "an infinite coefficient": (lambda: Lindbladian(2, [(math.inf, "X", 0)]), LindbladianError, "real and finite"),
    "a negative rate": (lambda: Lindbladian(2, [], [(-1.0, "sigma-", 0)]), LindbladianError, "negative.*got -1"),
    "a site too many": (lambda: Lindbladian(2, [(1.0, "X", 2)]), LindbladianError, "sites 0 to 1"),
    "a negative site": (lambda: Lindbladian(2, [(1.0, "ZZ", (-1, 0))]), LindbladianError, "doesn't exist"),
    "a site twice": (lambda: Lindbladian(2, [(1.0, "ZZ", (1, 1))]), LindbladianError, "twice"),
    "a site that isn't whole": (lambda: Lindbladian(2, [(1.0, "X", 0.5)]), LindbladianError, "integers"),
    "an operator of the wrong size": (lambda: Lindbladian(2, [(1.0, "ZZ", 0)]), ShapeError, r"on 2 site\(s\) for 1"),
    "an unknown operator": (lambda: Lindbladian(2, [(1.0, "W", 0)]), InvalidInputError, "unknown operator"),
    "a term of two entries": (lambda: Lindbladian(2, [("X", 0)]), LindbladianError, "coefficient, operator, sites"),
    "too few coefficients": (lambda: Lindbladian(3, [([1.0, 2.0], "X", "all")]), LindbladianError, "2 for 3 places"),
    "a frame for other levels": (
        lambda: Lindbladian(2, [(1.0, "X", 0)]).master_operator(QutritSIC()), InvalidInputError, "3 levels"),
    "frames for other sites": (
        lambda: Lindbladian(2, [(1.0, "X", 0)]).master_operator(SiteFrames([Tetrahedral()])),
        InvalidInputError, "one frame for each site"),
    "no sites": (lambda: Lindbladian(0), InvalidInputError, "num_sites"),
    "a term on six sites": (
        lambda: Lindbladian(6, [(1.0, "ZZZZZZ", tuple(range(6)))]).master_operator(Tetrahedral()),
        LindbladianError, "too many sites"),
    "a coefficient that can't be read": (
        lambda: Lindbladian(2, [("2 g h", "X", 0)]), LindbladianError, "can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_unphysical_terms_are_refused(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


def test_qutip_operators_are_terms() -> None:
    qutip = pytest.importorskip("qutip")
    x, z, down = qutip.sigmax(), qutip.sigmaz(), qutip.sigmam()
    zz = qutip.tensor(z, z)
    model = Lindbladian.from_qutip(
        [(0.5, [z, z], (0, 1)), (0.5, zz, [(1, 2), (2, 0)]), (0.25, x, [0, 1, 2])],
        [(1.0, down, [0, 1, 2])],
        3,
    )
    mine = Lindbladian(3, [(0.5, "ZZ", ring(3)), (0.25, "X", "all")], [(1.0, "sigma-", "all")])
    p = torch.rand(64, dtype=F64)
    frame = FourPauli()
    torch.testing.assert_close(model.master_operator(frame).apply(p), mine.master_operator(frame).apply(p))
    with pytest.raises(LindbladianError, match="Hermitian"):
        Lindbladian.from_qutip([(1.0, down, 0)])
    with pytest.raises(LindbladianError, match="must be a Qobj"):
        Lindbladian.from_qutip([(1.0, "X", 0)])


def test_a_list_of_as_many_sites_as_the_operator_has_is_one_place() -> None:
    wanted = Lindbladian(3, [(1.0, "ZX", (2, 0))], [(0.3, "sigma- sigma+", (0, 1))])
    found = Lindbladian(3, [(1.0, "ZX", [2, 0])], [(0.3, "sigma- sigma+", [0, 1])])
    assert [term.sites for term in found.terms] == [term.sites for term in wanted.terms]
    assert [term.sites for term in Lindbladian(3, [(1.0, "X", [2, 0])]).terms] == [(2,), (0,)]
    assert [term.sites for term in Lindbladian(3, [(1.0, "ZZ", [[2, 0], [0, 1]])]).terms] == [(2, 0), (0, 1)]
    with pytest.raises(ShapeError, match="for 1"):
        Lindbladian(3, [(1.0, "ZZ", [0, 1, 2])])
    state = torch.rand(8, dtype=F64).softmax(0).diag().to(C128)
    one, other = (exact.evolve(wanted, state, [0.0], {"o": ("XZ", s)}).expect["o"] for s in ([2, 1], (2, 1)))
    assert torch.equal(one, other)


def test_where_all_rates_are_zero_nothing_changes() -> None:
    frame = Tetrahedral()
    for model in (Lindbladian(2), Lindbladian(2, [(0.0, "X", "all")], [(0.0, "sigma-", "all")])):
        assert not model.master_operator(frame).apply(torch.rand(16, dtype=F64)).any()
        net = AutoregressiveTransformer(2, layers=1, width=8, heads=2).double().set_product_state(frame, "x+")
        answers = [
            evolve(net, model, frame, [0.0, 1.0], num_samples=None, observables=["X"], progress=False),
            exact.evolve(model, "x+", [0.0, 1.0], ["X"]),
            mean_field.evolve(model, "x+", [0.0, 1.0], ["X"]),
        ]
        for answer in answers:
            torch.testing.assert_close(answer.expect["X"], torch.ones(2, dtype=F64))


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, scipy.sparse.coo_array, scipy.sparse.dia_matrix])
def test_sparse_matrices_are_operators_and_states(form) -> None:
    x, down, up = (named_operator(name).numpy() for name in ("X", "sigma-", "P0"))
    sparse = Lindbladian(1, [(1.0, form(x), 0)], [(0.5, form(down), 0)])
    dense = Lindbladian(1, [(1.0, x, 0)], [(0.5, down, 0)])
    one = exact.evolve(sparse, form(up), [0.0, 1.0], {"z": form(named_operator("Z").numpy())}).expect["z"]
    assert torch.equal(one, exact.evolve(dense, "up", [0.0, 1.0], {"z": "Z"}).expect["z"])
