"""Scores and currents that are learnt, and estimates from trajectories alone."""

from __future__ import annotations

import copy

import pytest
import torch

import stochdyn as sd
from stochdyn.core import Hutchinson
from stochdyn.datasets import bead_chain, driven_ring, swimmer_pair, trapped_swimmers
from stochdyn.datasets.swimmers import _settle
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError
from stochdyn.nonequilibrium import (
    NEEP,
    CurrentNetwork,
    LinearSteadyState,
    PairCurrents,
    ParticleScore,
    ShortTimeTUR,
    SteadyCurrent,
    SteadyScore,
    SteadyScoreMatching,
    entropy_production_rate,
    neighbours,
    short_time_entropy,
    sum_rule,
)
from stochdyn.testing import (
    ObjectiveSuite,
    check_device,
    check_order,
    check_repetition,
    check_storage,
    check_units,
)

D = torch.float64


def bead_paths(seed: int, num_paths: int = 10, horizon: float = 100.0) -> torch.Tensor:
    force = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1) - 2 * torch.eye(5)
    chain = LinearSteadyState(force, torch.diag((2 * torch.linspace(1, 10, 5)).sqrt()))
    return chain.law.sample(torch.arange(0, horizon, 0.01, dtype=D), num_paths, seed).x


class TestScoreMatching(ObjectiveSuite):
    def make(self) -> tuple[SteadyScoreMatching, torch.Tensor]:
        ring = driven_ring()
        x = ring.sample(64, 0)
        torch.manual_seed(0)
        score = SteadyScore(x, (8,), ring.base_score, ring.periods)
        return SteadyScoreMatching(ring.sde, score, fp_weight=1.0), x


class TestDenoising(ObjectiveSuite):
    def make(self) -> tuple[SteadyScoreMatching, torch.Tensor]:
        ring = driven_ring(1.0, 1.0, 0.5)
        x = ring.sample(64, 0)
        torch.manual_seed(0)
        score = SteadyScore(x, (8,), ring.base_score, ring.periods)
        return SteadyScoreMatching(ring.sde, score, 1.0, noise_level=0.1), x


def test_denoising_finds_the_score_of_the_blurred_law() -> None:
    """Of a Gaussian: stationary at -(C + τ² diag C)⁻¹, and at -C⁻¹ only as the level falls, whatever the noise's strength there."""
    force = torch.tensor([[-2.0, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=D)
    state = LinearSteadyState(force, torch.diag((2 * torch.linspace(1, 10, 3, dtype=D)).sqrt()))
    net = torch.nn.Linear(3, 3, bias=False).double()

    def slopes(level: float, covariance: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the objective in units of its standard error, over batches."""
        objective = SteadyScoreMatching(state.sde, net, noise_level=level)
        torch.manual_seed(0)
        found = []
        with torch.no_grad():
            net.weight.copy_(-torch.linalg.inv(covariance))
        for seed in range(40):
            objective.zero_grad()
            objective(state.sample(1000, 500 + seed)).loss.backward()
            assert net.weight.grad is not None
            found.append(net.weight.grad.clone())
        values = torch.stack(found)
        return (values.mean(0) / (values.std(0) / 40**0.5)).abs().max()

    for level in (0.02, 0.3):
        blurred = state.covariance + level**2 * torch.diag(state.covariance.diagonal())
        assert float(slopes(level, blurred)) < 4.5
    assert float(slopes(0.3, state.covariance)) > 10
    with pytest.raises(InvalidInputError, match="noise_level"):
        SteadyScoreMatching(state.sde, net, noise_level=0.0)
    with pytest.raises(ShapeError, match="two draws"):
        SteadyScoreMatching(state.sde, net, noise_level=0.1)(state.sample(1, 0))


def test_what_is_no_gradient_in_a_score_is_seen_in_any_units() -> None:
    """A linear score with an antisymmetric part; a network has some of it, the gradient of a potential none."""
    turn, stretch = (
        torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=D),
        torch.diag(torch.tensor([-1.0, -2.0], dtype=D)),
    )
    draws = torch.randn(4000, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    draws = (draws - draws.mean(0)) / draws.std(0)
    sde = sd.SDE(lambda t, x: -x, 1.0)

    def answer(unit: float) -> torch.Tensor:
        scale = torch.tensor([unit, 1 / unit], dtype=D)
        net = torch.nn.Linear(2, 2, bias=False).double()
        with torch.no_grad():
            net.weight.copy_((turn + stretch) / scale / scale[:, None])
        found = SteadyScoreMatching(sde, net).conservativity(draws * scale, generator=0)
        assert abs(float(found.antisymmetric) - 0.5) < 4.5 * float(found.antisymmetric.stderr)
        return found.share.reshape(1)

    check_units(answer)
    assert float(answer(1.0)) == pytest.approx(0.5 / 5.5, rel=0.1)
    torch.manual_seed(0)
    for potential in (False, True):
        score = SteadyScore(draws, (8,), potential=potential)
        torch.nn.init.normal_(score.network.layers[-1].weight)  # type: ignore[arg-type]
        share = float(SteadyScoreMatching(sde, score).conservativity(draws[:100], generator=0).share)
        assert (share < 1e-25) if potential else (share > 1e-3)


def test_a_learnt_score_of_a_ring() -> None:
    ring = driven_ring()
    x, y = ring.sample(10_000, 0), ring.sample(10_000, 1)
    torch.manual_seed(0)
    for potential in (False, True):
        score = SteadyScore(x, (16, 16), ring.base_score, ring.periods, potential=potential)
        objective = SteadyScoreMatching(ring.sde, score, fp_weight=1.0)
        sd.fit(objective, x, steps=150, lr=1e-2, batch_size=500, seed=0, progress=False)
        rate = entropy_production_rate(SteadyCurrent(ring.sde, objective), y)
        assert float(rate) == pytest.approx(ring.entropy_production, rel=0.06)  # type: ignore[arg-type]
        # periodic by construction
        torch.testing.assert_close(score(y[:5]), score(y[:5] + 2 * torch.pi), rtol=1e-6, atol=1e-9)


def test_an_untrained_score_is_exact_for_gaussian_states_in_any_units() -> None:
    chain = bead_chain(3)
    x = chain.sample(5000, 0)

    def answer(unit: float) -> torch.Tensor:
        scale = torch.tensor([unit, 1.0, 1 / unit], dtype=D)
        torch.manual_seed(0)
        score = SteadyScore(x * scale, (8,))
        sde = sd.SDE(
            lambda t, z: scale * chain.sde.drift(t, z / scale),
            sd.Diagonal(scale * (2 * torch.linspace(1, 10, 3, dtype=D)).sqrt()),
        )
        objective = SteadyScoreMatching(sde, score, fp_weight=1.0)
        value = objective((x * scale)[:200]).loss.detach()
        rate = entropy_production_rate(SteadyCurrent(sde, score), x * scale)
        return torch.stack([value, rate.mean])  # type: ignore[union-attr]

    check_units(answer, rtol=1e-6)
    # too large by the error of the Gaussian's 6 numbers over 5000 draws
    assert float(answer(1.0)[1]) == pytest.approx(chain.entropy_production, rel=0.1)


def test_probes_are_unbiased() -> None:
    ring = trapped_swimmers(2)
    torch.manual_seed(0)
    x = torch.randn(40, 8, dtype=D)
    score = SteadyScore(x, (8,), ring.base_score)
    torch.nn.init.normal_(score.network.layers[-1].weight, std=0.3)  # type: ignore[arg-type]
    exact = SteadyScoreMatching(ring.sde, score, 1.0)(x).terms
    values = []
    objective = SteadyScoreMatching(ring.sde, score, 1.0, Hutchinson(num_probes=4))
    for _ in range(60):
        values.append(torch.stack([objective(x).terms[n].detach() for n in ("matching", "residual")]))
    mean, error = torch.stack(values).mean(0), torch.stack(values).std(0) / 60**0.5
    wanted = torch.stack([exact[n].detach() for n in ("matching", "residual")])
    assert bool(((mean - wanted).abs() < 4.5 * error).all())
    with pytest.raises(InvalidInputError, match="two probes"):
        SteadyScoreMatching(ring.sde, score, 1.0, Hutchinson(num_probes=1))


def test_particles_are_alike_local_and_smooth() -> None:
    torch.manual_seed(0)
    net = ParticleScore(2, cutoff=3.0, width=16).double()
    torch.nn.init.normal_(net.head.layers[-1].weight, std=0.3)  # type: ignore[arg-type]
    x = 2 * torch.randn(6, 4, dtype=D)

    def answer(particles: torch.Tensor) -> torch.Tensor:
        return net(particles.flatten()).unflatten(0, (-1, 4))

    check_order(answer, x, equivariant=True, rtol=1e-10)
    # with all that fit within the cutoff seen, fewer pairs are the same score
    few = copy.deepcopy(net)
    few.num_neighbors = 4
    line = torch.cat([1.4 * torch.arange(9, dtype=D)[:, None], torch.randn(9, 3, dtype=D)], -1)
    torch.testing.assert_close(few(line.flatten()), net(line.flatten()))
    # far away, a particle neither sees the others nor is seen
    far = x.clone()
    far[0, :2] = 100.0
    moved = far.clone()
    moved[0, :2] = 200.0
    torch.testing.assert_close(answer(far)[1:], answer(moved)[1:])
    # at one place: finite values and derivatives
    same = x.clone()
    same[1] = same[0]
    flat = same.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(net(flat).square().sum(), flat)
    assert bool(slope.isfinite().all())
    box = ParticleScore(1, cutoff=2.0, dim=2, width=8, box=10.0).double()
    torch.nn.init.normal_(box.head.layers[-1].weight, std=0.3)  # type: ignore[arg-type]
    y = 10 * torch.rand(5, 3, dtype=D)
    image = y.clone()
    image[2, 0] += 10.0
    torch.testing.assert_close(box(y.flatten()), box(image.flatten()))
    torch.testing.assert_close(box(y.flatten()), box((y + torch.tensor([3.3, -1.0, 0.0])).flatten()))
    with pytest.raises(ShapeError, match="whole particles"):
        net(torch.zeros(7))
    with pytest.raises(InvalidInputError, match="box"):
        ParticleScore(1, cutoff=2.0, box=3.0)


def test_pair_currents_are_alike_for_all_particles() -> None:
    torch.manual_seed(0)
    features, x = PairCurrents(2, 3.0, num_shells=4), 1.5 * torch.randn(6, 4, dtype=D)

    def answer(particles: torch.Tensor) -> torch.Tensor:
        return features(particles.flatten()).unflatten(-1, (-1, 4)).transpose(0, 1)

    check_order(answer, x, equivariant=True, rtol=1e-10)
    # turned as a whole, vectors turn
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=D)
    turned = (x.unflatten(-1, (2, 2)) @ turn).flatten(-2)
    wanted = (answer(x).unflatten(-1, (2, 2)) @ turn).flatten(-2)
    torch.testing.assert_close(answer(turned), wanted)
    # the pull of the first shell on two at half its reach: cos² is one half, and equal and opposite
    two = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.9, 0.0, 0.0, 1.0]], dtype=D)
    first = features(two.flatten())[2].unflatten(-1, (2, 4))
    torch.testing.assert_close(
        first, torch.tensor([[-0.5, 0, 0, 0], [0.5, 0, 0, 0]], dtype=D), atol=1e-12, rtol=0
    )
    # far away and at one place
    two[1, 0] = 100.0
    assert not bool(features(two.flatten())[2:22].any())
    two[1] = two[0]
    assert bool(features(two.flatten()).isfinite().all())
    box = PairCurrents(0, 3.0, num_shells=4, box=8.0)
    y = 8 * torch.rand(5, 2, dtype=D)
    image = y.clone()
    image[1, 0] += 8.0
    torch.testing.assert_close(box(y.flatten()), box(image.flatten()))
    with pytest.raises(ShapeError, match="whole particles"):
        features(torch.zeros(6))
    for call in (
        lambda: PairCurrents(2, 0.0),
        lambda: PairCurrents(3, 1.0),
        lambda: PairCurrents(2, 1.0, box=1.5),
        lambda: PairCurrents(2, 1.0, num_shells=0),
    ):
        with pytest.raises(InvalidInputError):
            call()


def test_every_particle_has_its_rate_from_trajectories_alone() -> None:
    """Swimmers that don't touch, in a trap: the closed form 8/15 of one, from five at a time, whose parts add up."""
    one = LinearSteadyState(
        torch.tensor([[-0.05, 0, 0.2, 0], [0, -0.05, 0, 0.2], [0, 0, -0.1, 0], [0, 0, 0, -0.1]], dtype=D),
        0.2**0.5 * torch.eye(4, dtype=D),
    )
    assert one.rate == pytest.approx(8 / 15, rel=1e-12)
    paths = one.law.sample(0.2 * torch.arange(251, dtype=D), (20, 5), 0).x
    states = paths.transpose(1, 2).flatten(-2)
    groups = {str(i): list(range(4 * i, 4 * i + 4)) for i in range(5)}
    # headings of one see the others, which tell nothing: currents that are not there cost only noise
    found = short_time_entropy(states, 0.2, PairCurrents(2, 3.0, num_shells=2), by=groups)
    assert abs(found.rate / 5 - 8 / 15) < 4.5 * found.stderr / 5 + 0.01
    assert found.stderr / 5 < 0.06
    assert sum(found.parts.values()) == pytest.approx(found.rate, rel=1e-9)
    assert len(found.parts) == 5


def test_draws_of_swimmers_are_those_of_the_steady_state() -> None:
    """One swimmer in the trap in closed form; several by sum rules that agree on the steady state and on no law of long Euler steps."""
    one = trapped_swimmers(1)
    x = one.sample(2000, 0)
    # dr = (v g - A r) dt + sqrt(2 e) dW: <r^2> = e / A + v^2 / (A (A + c)) and <r g> = v / (A + c) per axis; sigma = 2 v^2 c / (e (A + c))
    for values, wanted in (
        (x[:, 0].square(), 2 + 0.04 / (0.05 * 0.15)),
        (x[:, 0] * x[:, 2], 0.2 / 0.15),
        (x[:, 2].square(), 1.0),
    ):
        assert abs(float(values.mean()) - wanted) < 4.5 * float(values.std()) / 2000**0.5
    for base in (None, one.base_score):
        rate = sum_rule(one.sde, x, base=base)
        assert abs(float(rate) - 8 / 15) < 4.5 * float(rate.stderr)
    # the plain rule less the one with a base: the mean of the generator on an energy, zero in the steady state
    three = trapped_swimmers(3)
    x, t = three.sample(500, 0), torch.zeros((), dtype=D)
    assert three.base_score is not None
    half = 0.5 * three.sde.diffusion(t, x).value.square()
    spread = sd.core.divergence(lambda y: half * three.base_score(y), x)  # type: ignore[misc]
    gap = (three.sde.drift(t, x) * three.base_score(x)).sum(-1) + spread
    assert abs(float(gap.mean())) < 4.5 * float(gap.std()) / 500**0.5
    plain, sharp = sum_rule(three.sde, x), sum_rule(three.sde, x, base=three.base_score)
    assert float(plain) - float(sharp) == pytest.approx(float(gap.mean()), abs=1e-9)


def test_the_pair_of_swimmers_is_solved() -> None:
    """Rates by finite volumes on 640 by 181 cells, to some 3e-4; the score solves the stationary equation, and draws follow the density."""
    for speed, rate in ((0.1, 0.0780), (0.25, 0.3969), (0.5, 1.1887)):
        assert swimmer_pair(speed).entropy_production == pytest.approx(rate, abs=4e-4)
    assert swimmer_pair(0.0).entropy_production == pytest.approx(0.0, abs=1e-12)
    pair = swimmer_pair()
    x = pair.sample(4000, 0)
    assert pair.score is not None
    current = SteadyCurrent(pair.sde, pair.score)
    flow = sd.core.LearnedFlow(lambda t, y: pair.score(y), "score")  # type: ignore[misc]
    residual = sd.core.FokkerPlanck(pair.sde).residual(flow, 0.0, x, stationary=True)
    local = current.local(x)
    assert float(residual.abs().max()) < 1e-5 * float(local.mean())  # type: ignore[union-attr]
    parts = entropy_production_rate(current, x, by={"distance": [0], "propulsion": [1]})
    for name, rate in (("distance", 0.3645), ("propulsion", 0.0324)):
        assert abs(float(parts[name]) - rate) < 4.5 * float(parts[name].stderr) + 2e-4  # type: ignore[index]
    touching = ((x[:, 0] < 2) | (x[:, 0] > 14)).double()
    assert abs(float(touching.mean()) - 0.1146) < 4.5 * (0.1146 * 0.8854 / 4000) ** 0.5
    for base in (None, pair.base_score):
        rule = sum_rule(pair.sde, x, base=base)
        assert abs(float(rule) - 0.39699) < 4.5 * float(rule.stderr)
    with pytest.raises(InvalidInputError, match="speed"):
        swimmer_pair(2.0)


def test_steps_do_not_widen_the_law_under_a_stiff_force() -> None:
    """Euler's steps would give 1 / (1 - k dt / 2) of the variance, 14 % too much here; Heun's are 1.6 % off."""
    stiff = sd.SDE(lambda t, x: -5 * x, 10**0.5)
    source = torch.Generator().manual_seed(0)
    x = _settle(stiff, torch.randn(20_000, 1, dtype=D, generator=source), 5.0, 0.05, source)
    assert abs(float(x.square().mean()) - 1) < 0.016 + 4.5 * (2 / 20_000) ** 0.5


def test_trained_things_are_stored_and_moved() -> None:
    ring = driven_ring()
    x = ring.sample(100, 0)
    torch.manual_seed(0)
    score = SteadyScore(x, (8,), None, ring.periods)
    objective = SteadyScoreMatching(ring.sde, score, 1.0)
    objective(x)
    other = copy.deepcopy(objective)
    torch.nn.init.ones_(objective.network.network.layers[-1].weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(objective.flow.score(0.0, x), other.flow.score(0.0, x))
    check_device(score)
    check_storage(score, lambda net: net(x))
    net = CurrentNetwork(x, (8,))
    check_device(net)
    check_storage(net, lambda n: n(x))


class TestNEEP(ObjectiveSuite):
    def make(self) -> tuple[NEEP, torch.Tensor]:
        x = bead_paths(0, 1, 2.0)
        torch.manual_seed(0)
        net = CurrentNetwork(x[0], (8,))
        torch.nn.init.normal_(net.linear.weight, std=0.1)
        return NEEP(net, 0.01), neighbours(x)


@pytest.mark.parametrize("alpha", [0.0, -0.5])
def test_neep_finds_the_rate_of_a_chain(alpha: float) -> None:
    train, test = neighbours(bead_paths(0)), neighbours(bead_paths(1))
    torch.manual_seed(0)
    objective = NEEP(CurrentNetwork(train[:, 0], ()), 0.01, alpha)
    sd.fit(objective, train, steps=400, lr=1e-2, batch_size=4096, seed=0, progress=False)
    bound = objective.bound(test)
    # T = 1000: the bound scatters by sqrt(2 σ / T) and the estimate by twice that; exact at this lag .6178
    assert abs(float(bound) - 0.6178) < 4.5 * 0.036
    assert float(objective.bound(train)) > 0.4


def test_neep_and_the_uncertainty_bound_in_exact_cases() -> None:
    """With the exact current their values are the closed form of Gaussian pairs, and α changes nothing at the optimum."""
    chain = bead_chain()
    pairs = neighbours(bead_paths(2))
    v_dual = SteadyCurrent(chain.sde, chain.score)  # type: ignore[arg-type]

    def exact(x: torch.Tensor) -> torch.Tensor:
        return v_dual.evaluate(x).dual

    values = [float(NEEP(exact, 0.01, a)(pairs).terms["bound"]) for a in (0.0, -0.5, -1.0, 0.3)]
    tur = float(ShortTimeTUR(exact, 0.01)(pairs).terms["bound"])
    for value in (*values, tur):
        assert value == pytest.approx(0.6198, abs=4.5 * 0.036)
    assert max(values) - min(values) < 0.02
    general = NEEP(lambda a, b: (a * b.flip(-1)).sum(-1), 0.01, current=False)
    torch.testing.assert_close(general.production(pairs), -general.production(pairs.flip(1)))
    with pytest.raises(ShapeError, match="pairs"):
        NEEP(exact, 0.01)(torch.zeros(3, 5))


def test_trajectories_alone_in_any_units_and_order() -> None:
    x = bead_paths(0)

    def answer(unit: float) -> torch.Tensor:
        scale = torch.tensor([unit, 1.0, 1 / unit, 1.0, unit], dtype=D)
        found = short_time_entropy(x * scale, 0.01 * unit)
        return unit * torch.tensor([found.rate, found.stderr, found.in_sample], dtype=D)

    check_units(answer, rtol=1e-6)
    check_repetition(lambda: torch.tensor(short_time_entropy(x, 0.01).rate))
    perm = [3, 1, 4, 0, 2]
    whole = short_time_entropy(x, 0.01, by={"a": [0, 1], "b": [2, 3, 4]})
    assert short_time_entropy(x[..., perm], 0.01).rate == pytest.approx(whole.rate, rel=1e-8)
    assert whole.parts["a"] + whole.parts["b"] == pytest.approx(whole.rate, rel=1e-9)
    # features of one's own that span the same currents
    own = short_time_entropy(x, 0.01, lambda m: _products(m), by={"a": [0, 1], "b": [2, 3, 4]})
    assert own.rate == pytest.approx(whole.rate, rel=1e-6)
    assert own.parts["a"] == pytest.approx(whole.parts["a"], rel=1e-5)


def _products(m: torch.Tensor) -> torch.Tensor:
    one = torch.cat([m, torch.ones_like(m[..., :1])], -1)
    eye = torch.eye(m.shape[-1], dtype=m.dtype)
    return (one[..., :, None, None] * eye).flatten(-3, -2)


def test_what_an_estimate_cannot_know_it_says() -> None:
    x = bead_paths(0)
    noisy = x + 0.3 * torch.randn(x.shape, dtype=D, generator=torch.Generator().manual_seed(1))
    with pytest.warns(ApproximationWarning, match="rises with the lag"):
        low = short_time_entropy(noisy, 0.01)
    assert low.rate < 0.4
    # positions of an underdamped pair, whose bound would mean nothing
    a = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -1, 0], [1, -2, 0, -1]], dtype=D)
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = 2**0.5, 2.0
    pair = LinearSteadyState(a, g, [1, 1, -1, -1]).law.sample(torch.arange(0, 50, 0.01, dtype=D), 4, 0).x
    with pytest.warns(ApproximationWarning, match=r"\[0, 1\] move smoothly"):
        short_time_entropy(pair[..., :2], 0.01)
    with pytest.warns(ApproximationWarning, match="currents"):
        short_time_entropy(x[:1, :45], 0.01, num_blocks=4)
    with pytest.raises(ShapeError, match="too short"):
        short_time_entropy(x[:1, :30], 0.01)
    with pytest.raises(InvalidInputError, match="lags"):
        short_time_entropy(x, 0.01, lags=(1, 1))
    with pytest.raises(InvalidInputError, match="doesn't move"):
        short_time_entropy(torch.cat([x, torch.zeros_like(x[..., :1])], -1), 0.01)


@pytest.mark.slow
def test_intervals_from_trajectories_alone_cover() -> None:
    """Forty series of 1000 time units: mean right, errors calibrated."""
    found = [short_time_entropy(bead_paths(seed), 0.01) for seed in range(40)]
    rates = torch.tensor([f.rate for f in found])
    inside = sum(abs(f.rate - 0.6298172795) < 1.96 * f.stderr for f in found)
    assert abs(float(rates.mean()) - 0.6298) < 4.5 * float(rates.std()) / 40**0.5
    assert inside >= 34
    # the information in a series of this length: sqrt(8 σ / T)
    assert float(rates.std()) < 1.4 * (8 * 0.6298 / 1000) ** 0.5


@pytest.mark.slow
def test_a_pair_of_swimmers_by_its_score() -> None:
    """Without the residual and with a little of it, the rate agrees with the sum rule on the same draws and with finite volumes."""
    pair = swimmer_pair()
    x, y = pair.sample(20_000, 0), pair.sample(20_000, 1)
    rule = sum_rule(pair.sde, y, base=pair.base_score)
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        score = SteadyScore(x, (64, 64, 64), pair.base_score, pair.periods)
        objective = SteadyScoreMatching(pair.sde, score, weight)
        sd.fit(
            objective, x, steps=600, lr=2e-3, batch_size=1024, seed=0, progress=False,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 600),
        )  # fmt: skip
        current = SteadyCurrent(pair.sde, score)
        total = entropy_production_rate(current, y)
        parts = entropy_production_rate(current, y, by={"x": [0], "g": [1]})
        assert float(total) == pytest.approx(pair.entropy_production, rel=0.05)  # type: ignore[arg-type]
        assert float(parts["g"]) == pytest.approx(0.0324, rel=0.25)  # type: ignore[index]
        assert abs(float(total) - float(rule)) < 2 * float(rule.stderr)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [NEEP, ShortTimeTUR])
def test_training_on_pairs_has_no_unit_of_time_or_length(kind: type) -> None:
    x = bead_paths(0, 2, 20.0)

    def answer(time: float, length: float) -> torch.Tensor:
        torch.manual_seed(0)
        pairs = neighbours(x * length)
        objective = kind(CurrentNetwork(pairs[:, 0], (8,)), 0.01 * time)
        sd.fit(objective, pairs, steps=10, lr=1e-2, batch_size=200, seed=0, progress=False)
        return objective(pairs).terms["bound"] * time

    check_units(lambda factor: answer(factor, 1.0), factors=(1e-9, 1e9), rtol=1e-5)
    check_units(lambda factor: answer(1.0, factor), factors=(1e-6, 1e6), rtol=1e-5)
