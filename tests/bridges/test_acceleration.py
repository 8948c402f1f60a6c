"""Anderson acceleration: exact on linear maps, and safe and faster in the refinement."""

from __future__ import annotations

import torch

from stochdyn.bridges import LinearDrift, Repressilator, Sinkhorn, Snapshots, refine
from stochdyn.bridges.refinement import Anderson, get_vector, set_vector
from stochdyn.datasets import repressilator

F64 = torch.float64


def test_a_linear_map_is_solved_in_as_many_steps_as_it_has_dimensions() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=F64)).Q
    matrix = basis @ torch.diag(torch.tensor([0.95, 0.6, -0.3], dtype=F64)) @ basis.mT
    target = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    anderson, theta = Anderson(3), torch.zeros(3, dtype=F64)
    for _ in range(5):
        theta = anderson.propose(theta, target + matrix @ (theta - target))
    torch.testing.assert_close(theta, target, atol=1e-8, rtol=0)


def test_the_first_proposal_and_the_one_after_forgetting_are_plain() -> None:
    anderson = Anderson(2)
    one, image = torch.tensor([1.0], dtype=F64), torch.tensor([0.9], dtype=F64)
    assert torch.equal(anderson.propose(one, image), image)
    anderson.propose(image, 0.9 * image)
    anderson.forget()
    assert len(anderson.pairs) == 1


def test_vectors_go_in_and_out() -> None:
    family = LinearDrift(2)
    set_vector(family, torch.arange(6.0, dtype=F64))
    assert get_vector(family).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert family.weight.dtype == torch.float32


def test_acceleration_gets_further_in_as_many_iterations_and_never_up() -> None:
    """The repressilator's parameters are strongly correlated: plain iterations creep."""
    data = repressilator(15, times=[0.0, 1.5, 3.0, 4.5], generator=1)
    snaps = Snapshots(data.times, data.samples)
    options = {"diffusion": 0.1, "max_iterations": 6, "dt": 0.2, "tolerance": 1e-6}
    plain = refine(snaps, Repressilator(), **options, method=Sinkhorn(num_nodes=8_000))
    fast = refine(snaps, Repressilator(), **options, method=Sinkhorn(num_nodes=8_000, accelerate=True))
    assert fast.objective < plain.objective - 1.0
    assert float(fast.history.trace.diff().max()) < 0.05 * abs(fast.objective)
