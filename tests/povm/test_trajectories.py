"""Quantum trajectories: their mean is the Lindblad equation, and single ones stay pure and of norm one."""

from __future__ import annotations

import math

import pytest
import torch

from stochdyn.errors import (
    InvalidInputError,
    LindbladianError,
    SystemSizeError,
    TimeGridError,
    UnavailableError,
)
from stochdyn.povm import Lindbladian, exact, ring, systems, trajectories
from stochdyn.povm.master import DensityGenerator

F64, C128 = torch.float64, torch.complex128


def model(n: int = 2) -> Lindbladian:
    return Lindbladian(
        n,
        [(0.5, "XX", (0, 1)), (0.3, "Z", "all"), (0.7, "Y", 0)],
        [(1.0, "sigma-", "all"), (0.4, torch.randn(4, 4, dtype=C128) / 4, (0, 1)), (0.2, "Z", 1)],
    )


def test_the_mean_rate_of_the_projector_is_that_of_lindblad() -> None:
    r"""By Itô: d(psi psi^+) = f psi^+ + psi f^+ + sum_k g_k g_k^+, exactly, for a vector of norm one."""
    m = model()
    equation = trajectories.diffusion_equation(m)
    psi = torch.randn(3, 4, dtype=C128)
    psi = psi / psi.abs().square().sum(-1, keepdim=True).sqrt()
    x = torch.cat([psi.real, psi.imag], -1)
    t = torch.tensor(0.0, dtype=F64)
    drift = torch.complex(*equation.drift(t, x).chunk(2, -1))
    spread = equation.diffusion(t, x).value
    noise = torch.complex(spread[:, :4], spread[:, 4:])
    outer = torch.einsum("mi,mj->mij", drift, psi.conj())
    change = outer + outer.mH + torch.einsum("mik,mjk->mij", noise, noise.conj())
    generator = DensityGenerator(m)
    for i in range(3):
        rho = torch.outer(psi[i], psi[i].conj()).numpy()
        torch.testing.assert_close(change[i], torch.from_numpy(generator(0.0, rho)), atol=1e-12, rtol=0)
    # the norm neither drifts nor diffuses
    assert float(change.diagonal(dim1=1, dim2=2).sum(-1).abs().max()) < 1e-12
    assert float(torch.einsum("mi,mik->mk", psi.conj(), noise).real.abs().max()) < 1e-12


DRIVEN = Lindbladian(
    3,
    [(0.5, "ZZ", ring(3)), (lambda t: 2 * math.cos(5 * t), "X", "all")],
    [(lambda t: 1 + math.sin(3 * t), "sigma-", "all")],
)
STRONG = Lindbladian(4, [(2.0, "ZZ", ring(4)), (2.0, "X", "all")], [(0.5, "sigma-", "all")])
SUPERRADIANT = Lindbladian(3, [(0.3, "Z", "all")], [(torch.ones(3, 3), "sigma-", [0, 1, 2])])


@pytest.mark.parametrize("m", [STRONG, DRIVEN, SUPERRADIANT], ids=["strong", "driven", "superradiant"])
def test_means_are_those_of_the_density_matrix(m) -> None:
    times = [0.0, 0.25, 1.0]
    specs = ["X", "Z", ("ZZ", (0, 1)), ("sigma-", 0)]
    mine = trajectories.evolve(m, "up", times, specs, num_trajectories=300, generator=0, progress=False)
    right = exact.evolve(m, "up", times, specs, backend="matrix")
    for name in mine.expect:
        # 4.5 standard errors: a false alarm in 10^5, of two dozen numbers
        error = (mine.expect[name] - right.expect[name]).abs()
        assert bool((error <= 4.5 * mine.stderr[name] + 1e-9).all()), name
    assert mine.step_error < 1e-5


def test_a_pulse_after_a_quiet_stretch_is_met() -> None:
    end = 20 + math.pi / 2
    pulsed = Lindbladian(1, [(lambda t: 1.0 if 20 <= t <= end else 0.0, "X", 0)], [(1e-4, "sigma-", 0)])
    run = trajectories.evolve(
        pulsed, "down", [0.0, 30.0], ["Z"], num_trajectories=10, generator=0, progress=False
    )
    assert float(run.expect["Z"][-1]) > 0.99


def test_the_start_may_be_entangled() -> None:
    ghz = torch.zeros(4)
    ghz[0] = ghz[3] = 1
    run = trajectories.evolve(systems.ising(2), ghz, [0.0], ["Z", "ZZ"], num_trajectories=5, progress=False)
    assert float(run.expect["ZZ"][0]) == pytest.approx(1)
    assert abs(float(run.expect["Z"][0])) < 1e-12


def test_mixed_initial_states_are_drawn() -> None:
    rho = torch.tensor([[0.75, 0.25], [0.25, 0.25]], dtype=F64)
    run = trajectories.evolve(
        systems.ising(2),
        [rho, "x-"],
        [0.0],
        {"z": ("Z", 0), "x": ("X", 1)},
        num_trajectories=4000,
        progress=False,
    )
    assert abs(float(run.expect["z"][0]) - 0.5) < 4.5 * float(run.stderr["z"][0])
    assert abs(float(run.expect["x"][0]) + 1) < 1e-12


BAD = {
    "times that fall": (lambda: trajectories.evolve(model(), "up", [1.0, 0.0]), TimeGridError, "increase"),
    "too many sites": (lambda: trajectories.evolve(systems.ising(20), "up", [0.0, 1.0]), SystemSizeError, "too large"),
    "no jumps to diffuse": (
        lambda: trajectories.diffusion_equation(Lindbladian(1, [(1.0, "X", 0)])), InvalidInputError, "one jump"),
    "a diffusion that moves": (
        lambda: trajectories.diffusion_equation(Lindbladian(1, [(lambda t: t, "X", 0)], [(1.0, "Z", 0)])),
        UnavailableError, "constant in time"),
    "a rate that turns negative": (
        lambda: trajectories.evolve(Lindbladian(1, [], [(torch.cos, "Z", 0)]), "up", [0.0, 6.0]),
        LindbladianError, "becomes negative"),
    "a single trajectory": (
        lambda: trajectories.evolve(model(), "up", [0.0, 1.0], num_trajectories=1), InvalidInputError, "at least 2"),
    "too few states": (lambda: trajectories.evolve(model(), ["up"], [0.0, 1.0]), InvalidInputError, "one state for each site"),
    "no step": (lambda: trajectories.evolve(model(), "up", [0.0, 1.0], max_step=0.0), InvalidInputError, "max_step"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


def test_every_jump_is_drawn_with_the_rates_of_its_own_time() -> None:
    """Decay and a flip take turns; which of them a trajectory jumps by depends on when it does."""
    switched = Lindbladian(
        1,
        [(0.2, "X", 0)],
        [
            (lambda t: 3.0 * (1 + math.cos(20 * t)), "sigma-", 0),
            (lambda t: 3.0 * (1 - math.cos(20 * t)), "X", 0),
        ],
    )
    times = [0.0, 0.1, 0.25, 0.6]
    mine = trajectories.evolve(
        switched, "up", times, ["Z"], num_trajectories=600, generator=0, progress=False
    )
    right = exact.evolve(switched, "up", times, ["Z"], backend="matrix").expect["Z"]
    assert bool(((mine.expect["Z"] - right).abs() <= 4.5 * mine.stderr["Z"] + 1e-9).all())


def test_mixed_states_of_the_whole_lattice_are_drawn() -> None:
    bell = torch.zeros(4, 4, dtype=C128)
    bell[0, 0] = bell[0, 3] = bell[3, 0] = bell[3, 3] = 0.5
    werner = 0.7 * bell + 0.3 * torch.eye(4) / 4
    run = trajectories.evolve(
        systems.ising(2), werner, [0.0], ["ZZ", "XX"], num_trajectories=4000, generator=0, progress=False
    )
    for name in ("ZZ", "XX"):
        assert abs(float(run.expect[name][0]) - 0.7) < 4.5 * float(run.stderr[name][0])
