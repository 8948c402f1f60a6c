"""Entropies, entanglement, fidelity and work, against closed forms and QuTiP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.errors import (
    ConvergenceWarning,
    InvalidInputError,
    LindbladianError,
    ShapeError,
    UnavailableError,
)
from stochdyn.povm import (
    Lindbladian,
    Tetrahedral,
    capacity,
    ergotropy,
    exact,
    fidelity,
    mutual_information,
    named_operator,
    negativity,
    reduced_density,
    renyi_entropy,
    systems,
    von_neumann_entropy,
)
from stochdyn.povm.frames import partial_trace

C128 = torch.complex128


def state(size: int, rank: int | None = None) -> Tensor:
    m = torch.randn(size, rank or size, dtype=C128)
    return m @ m.mH / (m @ m.mH).diagonal().sum()


def test_qutip_agrees() -> None:
    qutip = pytest.importorskip("qutip")
    a, b = state(8), state(8, 3)
    dims = [[2, 2, 2], [2, 2, 2]]
    q, r = qutip.Qobj(a.numpy(), dims=dims), qutip.Qobj(b.numpy(), dims=dims)
    assert float(von_neumann_entropy(a)) == pytest.approx(qutip.entropy_vn(q))
    assert float(fidelity(a, b)) == pytest.approx(qutip.fidelity(q, r) ** 2, abs=1e-7)
    assert float(mutual_information(a, [0, 2])) == pytest.approx(qutip.entropy_mutual(q, [0, 2], [1]))
    pair = qutip.Qobj(state(4).numpy(), dims=[[2, 2], [2, 2]])
    assert float(negativity(pair, [1])) == pytest.approx(qutip.negativity(pair, 1))


def test_closed_forms() -> None:
    bell = torch.zeros(4, 4, dtype=C128)
    bell[0, 0] = bell[3, 3] = bell[0, 3] = bell[3, 0] = 0.5
    assert float(negativity(bell, [0])) == pytest.approx(0.5)
    assert float(mutual_information(bell, [1])) == pytest.approx(2 * math.log(2))
    werner = 0.8 * bell + 0.2 * torch.eye(4) / 4
    assert float(negativity(werner, [0])) == pytest.approx((3 * 0.8 - 1) / 4)
    rho = state(4)
    assert float(renyi_entropy(rho, 2)) == pytest.approx(-math.log(float((rho @ rho).diagonal().sum().real)))
    assert float(renyi_entropy(rho, 1 + 1e-6)) == pytest.approx(float(von_neumann_entropy(rho)), rel=1e-4)
    assert float(negativity(torch.kron(state(2), state(2)), [0])) == pytest.approx(0, abs=1e-12)


def test_ergotropy_is_reached_by_a_unitary_and_no_other_does_better() -> None:
    rho, h = state(4), state(4) * 3
    work = float(ergotropy(rho, h))
    levels, vectors = torch.linalg.eigh(h)
    weights, states = torch.linalg.eigh(rho)
    u = vectors @ states.flip(-1).mH
    energy = float((rho @ h).diagonal().sum().real)
    assert work == pytest.approx(energy - float((u @ rho @ u.mH @ h).diagonal().sum().real))
    active = float((weights * levels).sum())
    assert float(capacity(rho, h)) == pytest.approx(active - energy + work)
    for _ in range(5):
        random = torch.linalg.qr(torch.randn(4, 4, dtype=C128))[0]
        assert energy - float((random @ rho @ random.mH @ h).diagonal().sum().real) <= work + 1e-12


def test_batches_of_exact_states_and_reduced_ones() -> None:
    model = systems.ising(3)
    run = exact.evolve(model, "up", [0.0, 0.5, 1.0], ["Z"], backend="matrix", keep_states=True)
    assert von_neumann_entropy(run.states).shape == negativity(run.states, [0]).shape == (3,)
    assert float(ergotropy(run.states, model)[0]) > 0
    p = exact.propagate(model, Tetrahedral(), "up", [0.0, 1.0])[-1]
    pair = reduced_density(Tetrahedral(), p, [0, 1])
    whole = exact.evolve(model, "up", [0.0, 1.0], ["Z"], backend="matrix", keep_states=True).states[-1]
    traced = torch.einsum("abcdec->abde", whole.reshape(2, 2, 2, 2, 2, 2)).reshape(4, 4)
    assert float(fidelity(pair, traced)) == pytest.approx(1, abs=1e-6)


def test_what_isn_t_a_state_is_refused_or_said() -> None:
    with pytest.warns(ConvergenceWarning, match="isn't positive"):
        von_neumann_entropy(torch.diag(torch.tensor([1.1, -0.1])))
    with pytest.raises(InvalidInputError, match="Hermitian"):
        von_neumann_entropy(torch.tensor([[0.5, 1.0], [0.0, 0.5]]))
    with pytest.raises(ShapeError, match="power of 2"):
        negativity(torch.eye(3) / 3, [0])
    with pytest.raises(LindbladianError, match="doesn't exist"):
        negativity(torch.eye(4) / 4, [2])
    with pytest.raises(ShapeError, match="differ in size"):
        ergotropy(torch.eye(4) / 4, Lindbladian(1, [(1.0, "Z", 0)]))


def swapping(kappa: float, g: float) -> Lindbladian:
    """A charger, site 0, that hands one quantum to a battery, site 1, and leaks."""
    return Lindbladian(
        2, [(g / 2, "XX", (0, 1)), (g / 2, "YY", (0, 1))], [(kappa, "sigma-", 0)] if kappa else []
    )


@pytest.mark.parametrize("kappa", [0.0, 0.5, 6.0])
def test_a_battery_of_two_spins(kappa: float) -> None:
    """In the sector of one quantum the amplitudes are those of a damped pendulum, also overdamped."""
    g, omega = 1.0, 2.0
    ts = torch.linspace(0, 3, 13, dtype=torch.float64)
    model = swapping(kappa, g)
    run = exact.evolve(model, ["up", "down"], ts, {"Z": ("Z", 1)}, backend="matrix", keep_states=True)
    rate = torch.sqrt(torch.tensor(g**2 - kappa**2 / 16, dtype=C128))
    share = (g / rate * torch.sin(rate * ts) * torch.exp(-kappa * ts / 4)).abs().square()
    torch.testing.assert_close(omega * (run.expect["Z"] + 1) / 2, omega * share, atol=1e-9, rtol=0)
    battery = partial_trace(run.states, [1])
    own = omega / 2 * named_operator("Z")
    work, spread = omega * (2 * share - 1).clamp(min=0), omega * (2 * share - 1).abs()
    torch.testing.assert_close(ergotropy(battery, own), work, atol=1e-9, rtol=0)
    torch.testing.assert_close(capacity(battery, own), spread, atol=1e-9, rtol=0)
    # the same from outcome probabilities of the reduced state
    p = exact.propagate(model, Tetrahedral(), ["up", "down"], ts)
    seen = torch.stack([reduced_density(Tetrahedral(), q, [1]) for q in p])
    torch.testing.assert_close(ergotropy(seen, own), work, atol=1e-9, rtol=0)
    if not kappa:  # a pure state of one quantum with amplitudes cos and sin
        torch.testing.assert_close(
            negativity(run.states, [0]), (share * (1 - share)).sqrt(), atol=1e-7, rtol=0
        )


def test_the_capacity_of_two_spins_in_terms_of_eigenvalues() -> None:
    """Levels a+b, a-b, b-a, -a-b with weights in order: 2 (a+b)(p1 - p4) + 2 (a-b)(p2 - p3)."""
    a, b = 1.3, 0.4
    h = a * named_operator("ZI") + b * named_operator("IZ")
    rho = state(4)
    p = torch.linalg.eigvalsh(rho).flip(-1)
    expected = 2 * (a + b) * (p[0] - p[3]) + 2 * (a - b) * (p[1] - p[2])
    assert float(capacity(rho, h)) == pytest.approx(float(expected))
    # work and what is left to charge add up to it
    anti = -ergotropy(rho, -h)
    assert float(ergotropy(rho, h) - anti) == pytest.approx(float(expected))


def _near_mixed(p: Tensor) -> Tensor:
    """A state of three levels from any numbers ``(2, 3, 3)``; equal eigenvalues at zero."""
    matrix = torch.eye(3, dtype=torch.float64) / 3 + torch.complex(p[0] + p[0].mT, p[1] - p[1].mT)
    excess = matrix.diagonal().real.sum() - 1
    return matrix - torch.eye(3, dtype=torch.complex128) * (excess / 3)


@pytest.mark.parametrize("size", [0.0, 0.03])
def test_fidelity_has_derivatives_at_equal_eigenvalues(size: float) -> None:
    g = torch.Generator().manual_seed(0)
    mixed = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    other = (size * torch.randn(2, 3, 3, dtype=torch.float64, generator=g)).requires_grad_()

    def value(p: Tensor, q: Tensor) -> Tensor:
        return fidelity(_near_mixed(p), _near_mixed(q))

    assert torch.autograd.gradcheck(value, (mixed, other))
    assert torch.autograd.gradcheck(value, (other, mixed))
    assert torch.autograd.gradgradcheck(value, (mixed, other))


def test_fidelity_has_first_derivatives_at_pure_states() -> None:
    """With a pure state it is <psi|rho|psi>, linear in rho, and |<psi|phi>|^2 between two."""
    psi = torch.tensor([1, 1j, 0], dtype=torch.complex128) / math.sqrt(2)
    target = torch.outer(psi, psi.conj())
    mixed = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    angle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def turned(t: Tensor) -> Tensor:
        phi = torch.stack([t.cos() + 0j, 1j * t.sin(), 0 * t])
        return torch.outer(phi, phi.conj())

    for order in (lambda x: fidelity(target, x), lambda x: fidelity(x, target)):
        assert torch.autograd.gradcheck(lambda p, order=order: order(_near_mixed(p)), (mixed,))
        assert torch.autograd.gradcheck(lambda t, order=order: order(turned(t)), (angle,))
        (slope,) = torch.autograd.grad(order(_near_mixed(mixed)), mixed, create_graph=True)
        with pytest.raises(UnavailableError, match="second derivative"):
            slope.sum().backward()


def test_matrices_that_are_no_states_are_refused() -> None:
    for function in (
        von_neumann_entropy,
        lambda rho: ergotropy(rho, torch.eye(2)),
        lambda rho: fidelity(rho, rho),
    ):
        with pytest.raises(InvalidInputError, match="trace one"):
            function(torch.eye(2))
    drive = Lindbladian(1, [(math.cos, "X", 0)])
    with pytest.raises(InvalidInputError, match="depends on time"):
        ergotropy(torch.eye(2) / 2, drive)
    with pytest.warns(ConvergenceWarning, match="isn't positive"):
        negativity(torch.diag(torch.tensor([0.6, 0.5, -0.1, 0.0])), [0])


@pytest.mark.parametrize("size", [0.0, 0.03])
@pytest.mark.parametrize(
    "quantity",
    [von_neumann_entropy, lambda rho: renyi_entropy(rho, 2.5), lambda rho: renyi_entropy(rho, 0.5)],
    ids=["entropy", "order 2.5", "order 0.5"],
)
def test_entropies_have_second_derivatives_at_equal_eigenvalues(quantity, size: float) -> None:
    g = torch.Generator().manual_seed(0)
    p = (size * torch.randn(2, 3, 3, dtype=torch.float64, generator=g)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: quantity(_near_mixed(p)), (p,))
    assert torch.autograd.gradgradcheck(lambda p: quantity(_near_mixed(p)), (p,))


def test_the_entropy_bends_as_it_does_about_the_mixed_qubit() -> None:
    """With Bloch vector r it is log 2 - r^2/2 to second order, and Renyi's of order a log 2 - a r^2/2."""
    paulis = torch.stack([named_operator(name) for name in "XYZ"])
    mixed = torch.eye(2, dtype=torch.complex128) / 2
    zero = torch.zeros(3, dtype=torch.float64)
    for order in (1.0, 2.0, 3.0):
        bend = torch.autograd.functional.hessian(
            lambda r, order=order: renyi_entropy(
                mixed + torch.einsum("i,ijk->jk", r / 2 + 0j, paulis), order
            ),
            zero,
        )
        torch.testing.assert_close(bend, -order * torch.eye(3, dtype=torch.float64))


def test_negativity_and_mutual_information_have_second_derivatives_where_levels_meet() -> None:
    def werner(p: Tensor, angle: Tensor) -> Tensor:
        psi = torch.stack([angle.cos() + 0j, 0 * angle, 0 * angle, angle.sin() + 0j])
        return p * torch.outer(psi, psi) + (1 - p) * torch.eye(4, dtype=torch.float64) / 4

    at = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, math.pi / 4)]
    for quantity in (negativity, mutual_information):
        assert torch.autograd.gradgradcheck(lambda *v, quantity=quantity: quantity(werner(*v), [0]), at)
