"""The lines that programs outside write, as they stand in the documentation of public names."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd


# strings that aren't symmetries of the model are allowed, and pointed out
@pytest.mark.filterwarnings("ignore:the model isn't symmetric")
def test_a_whole_program() -> None:
    g = torch.Generator().manual_seed(0)
    num_sites = 3
    for povm in (sd.povm.Tetrahedral(rotated=True), sd.povm.FourPauli()):
        assert povm.effects.shape == (4, 2, 2)
        assert povm.overlap.shape == (4, 4)
        assert povm.dual.shape == (4, 2, 2)
        assert povm.probabilities("up").shape == (4,)
        assert povm.coefficients("Z").shape == (4,)
    povm = sd.povm.Tetrahedral(rotated=True)
    model = sd.povm.Lindbladian(
        num_sites,
        hamiltonian=[(0.5, "ZZ", (0, 1)), (0.5, "ZZ", (1, 2)), (0.3, "X", (0,))],
        jumps=[(1.0, "sigma-", (i,)) for i in range(num_sites)],
    )
    operator = model.master_operator(povm)
    change = operator.apply(torch.full((4**num_sites,), 4.0**-num_sites, dtype=torch.float64))
    assert abs(float(change.sum())) < 1e-12
    net = sd.povm.AutoregressiveTransformer(
        num_sites, layers=2, width=8, heads=4, strings="translations"
    ).double()
    net.set_product_state(povm, "up")
    a, logp = net.sample(64, generator=g)
    assert a.shape == (64, num_sites)
    torch.testing.assert_close(net.log_prob(a).detach(), logp.detach())
    configurations, rates = operator.connected(a)
    assert configurations.shape == (*rates.shape, num_sites)
    times = torch.tensor([0.0, 0.05])
    specs = {"z": "Z", "zz": ("ZZ", (0, 1))}
    for method in ("tdvp", "trapezoid", "fit"):
        net.set_product_state(povm, "up")
        run = sd.povm.evolve(
            net, model, povm, times, method=method, num_samples=None, observables=specs, progress=False
        )
        right = sd.povm.exact.evolve(model, "up", times, specs)
        assert run.times.shape == (2,)
        assert abs(float(run.expect["z"][-1] - right.expect["z"][-1])) < 0.02
        assert run.stderr["zz"].shape == (2,)
        assert len(run.residual) in (1, 2)
    assert net.distribution().sample((5,)).shape == (5, num_sites)


def test_from_qutip() -> None:
    qutip = pytest.importorskip("qutip")
    z, x = qutip.sigmaz(), qutip.sigmax()
    terms = [(0.5, [z, z], (0, 1)), (1.0, x, (0,))]
    model = sd.povm.Lindbladian.from_qutip(terms, [(1.0, qutip.sigmam(), (i,)) for i in range(2)], 2)
    steady = sd.povm.exact.steady_state(model, ["Z"])
    assert steady.residual < 1e-12
