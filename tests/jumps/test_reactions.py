"""Reaction networks against exact laws: immigration and death, a gene that switches, an epidemic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import expm_multiply
from scipy.stats import binom, poisson

import stochdyn as sd
from stochdyn import testing
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    SystemSizeError,
)
from stochdyn.jumps import (
    LinearNoise,
    ParticleFilter,
    RateMatrix,
    ReactionNetwork,
    StateProjection,
    TauLeaping,
    fit_reactions,
)
from stochdyn.jumps.truncation import checked_counts

LAM, MU, START, T = 3.0, 0.5, 7, 1.3


def immigration() -> ReactionNetwork:
    return ReactionNetwork(["0 -> A", "A -> 0"], [LAM, MU], {"A": START})


def gene() -> ReactionNetwork:
    reactions = ["Off -> On", "On -> Off", "On -> On + P", "P -> 0"]
    return ReactionNetwork(reactions, [0.6, 1.4, 12.0, 1.0], {"Off": 1})


def exact_moments(t: float) -> tuple[float, float]:
    stay = math.exp(-MU * t)
    mean = LAM / MU * (1 - stay)
    return START * stay + mean, START * stay * (1 - stay) + mean


def test_immigration_and_death_is_a_binomial_plus_a_poisson() -> None:
    law = immigration().truncate({"A": 80}).marginal(T)
    stay = math.exp(-MU * T)
    for n in (0, 5, 7, 15):
        exact = sum(
            binom.pmf(k, START, stay) * poisson.pmf(n - k, LAM / MU * (1 - stay))
            for k in range(min(n, START) + 1)
        )
        assert float(law.probs[n]) == pytest.approx(exact, rel=1e-10)
    assert law.lost_mass < 1e-12
    assert float(law.log_prob(torch.tensor([5.0]))) == pytest.approx(math.log(float(law.probs[5])))
    assert float(law.log_prob(torch.tensor([500.0]))) == -math.inf


def test_paths_have_the_exact_moments_at_every_time() -> None:
    ts = [0.0, 0.3, 1.3, 4.0]
    x = immigration().sample(ts, 20_000, 0).x[..., 0]
    assert (x[:, 0] == START).all()
    for k, t in enumerate(ts[1:], 1):
        mean, variance = exact_moments(t)
        assert abs(float(x[:, k].mean()) - mean) < 4.5 * (variance / 20_000) ** 0.5
        assert abs(float(x[:, k].var()) - variance) < 0.05 * variance


def test_linear_noise_is_exact_for_linear_propensities() -> None:
    law = immigration().linear_noise()
    mean, variance = exact_moments(T)
    assert float(law.mean([T])) == pytest.approx(mean, abs=1e-8)
    assert float(law.covariance([T])) == pytest.approx(variance, abs=1e-8)


def test_a_switching_gene() -> None:
    law = gene().truncate({"Off": 1, "On": 1, "P": 80}).marginal(40.0)
    assert float(law.mean[2]) == pytest.approx(3.6, rel=1e-10)
    assert float(law.covariance[2, 2]) == pytest.approx(13.68, rel=1e-10)
    zero = law.probs.sum((0, 1))[0]
    assert float(zero) == pytest.approx(0.24846028673202294, rel=1e-11)
    drift = gene().langevin().drift(torch.tensor(0.0), torch.tensor([[1.0, 0.0, 3.0]]).double())
    torch.testing.assert_close(drift, torch.tensor([[-0.6, 0.6, -3.0]]).double())


def test_the_langevin_equation_has_the_moments_of_many_molecules() -> None:
    network = ReactionNetwork(["0 -> A", "A -> 0"], [300.0, 0.5], {"A": 700})
    law = sd.DiffusionMeasure(torch.tensor([700.0]).double(), network.langevin())
    x = law.sample(torch.linspace(0, 1.3, 200).double(), 4000, 0).x[:, -1, 0]
    stay = math.exp(-0.65)
    mean, variance = 700 * stay + 600 * (1 - stay), 700 * stay * (1 - stay) + 600 * (1 - stay)
    assert abs(float(x.mean()) - mean) < 4.5 * (variance / 4000) ** 0.5 + 0.5
    assert float(x.var()) == pytest.approx(variance, rel=0.12)


def test_an_epidemic_seen_at_four_times() -> None:
    network = ReactionNetwork(["S + I -> 2 I", "I -> R"], [0.3 / 20, 0.1], {"S": 19, "I": 1})
    truncated = network.truncate({"S": 20, "I": 20, "R": 20})
    seen = truncated.log_likelihood([5.0, 10.0, 15.0, 25.0], {"I": [2, 5, 6, 3]})
    assert float(seen) == pytest.approx(-7.933741777579925, rel=1e-12)


def test_counts_out_of_reach_change_nothing() -> None:
    """An epidemic within a box of which it can reach half, against a solver that takes the whole box."""
    network = ReactionNetwork(["S + I -> 2 I", "I -> 0"], [0.3 / 20, 0.1], {"S": 19, "I": 1})
    box = network.truncate({"S": 19, "I": 20})
    start = np.zeros(len(box.grid))
    start[19 * 21 + 1] = 1.0
    spread = np.random.default_rng(0).dirichlet(np.ones(len(start)))
    for p in (start, spread):
        exact = expm_multiply(box.generator.T.tocsr() * 8.0, p)
        np.testing.assert_allclose(box.propagate(p, 8.0), exact, rtol=0, atol=1e-13)
        both = box.propagate(np.stack([p, p], -1), 8.0, np.array([[0.3 / 20, 0.1], [0.3 / 20, 0.1]]))
        np.testing.assert_allclose(both[:, 1], exact, rtol=0, atol=1e-13)
    assert (box.propagate(np.zeros(len(start)), 8.0) == 0).all()


@pytest.mark.filterwarnings("ignore:The truncation leaks")
@pytest.mark.parametrize("bound", [7, 9, 14, 25])
@pytest.mark.parametrize("t", [0.05, T, 20.0])
def test_a_truncation_that_leaks_says_how_much(bound: int, t: float) -> None:
    """The certificate is the whole error, inside and outside the bounds, to the last digit: nothing is overestimated."""
    whole = immigration().truncate({"A": 80}).marginal(t).probs
    small = immigration().truncate({"A": bound}).marginal(t)
    error = float((whole[: bound + 1] - small.probs).abs().sum() + whole[bound + 1 :].sum())
    assert error == pytest.approx(small.lost_mass, rel=1e-9, abs=1e-12)
    assert float((whole[: bound + 1] - small.probs).min()) > -1e-12


def test_counts_that_no_state_has_are_refused_and_a_leak_is_said() -> None:
    tight = immigration().truncate({"A": 9})
    for wrong in (7.5, -1.0, 10.0):
        with pytest.raises(InvalidInputError, match="whole numbers within the bounds"):
            tight.log_likelihood([1.0, 2.0], {"A": [6.0, wrong]})
    with pytest.warns(ApproximationWarning, match="truncation leaks"):
        tight.log_likelihood([8.0], {"A": [8.0]})


def test_noisy_counts_far_from_all_states_have_a_finite_likelihood() -> None:
    at, seen = checked_counts(immigration(), [1.0, 2.0], {"A": [6.0, 200.0]})
    constants = torch.tensor([[LAM, MU]], dtype=torch.float64)
    found = StateProjection({"A": 60}, 1.0).log_likelihood(
        immigration(), at, seen, constants, torch.Generator()
    )
    # the nearest state that has any mass rules: -140^2 / 2 for a count of sixty
    assert -20_000 < float(found) < -9_000


def test_linear_noise_needs_no_horizon_and_answers_alike_whatever_else_is_asked() -> None:
    network = ReactionNetwork(["0 -> A", "2 A -> 0"], [1000.0, 1.0], {"A": 0})
    testing.check_question(
        lambda ts: network.linear_noise().mean(ts), torch.linspace(0, 0.02, 4).double(), rtol=1e-6
    )
    # it speeds up from rest, where the fastest rate at its start is zero: the root of a (a - 1) = 1000 is the end
    end = 0.5 + (0.25 + 1000.0) ** 0.5
    assert float(network.linear_noise().mean([0.3])[0, 0]) == pytest.approx(end, rel=1e-6)


def test_linear_noise_has_no_unit_of_time_and_ends_where_the_mean_explodes() -> None:
    def answer(unit: float) -> torch.Tensor:
        network = ReactionNetwork(
            ["0 -> A", "A -> 0", "2 A -> B"], [3 / unit, 0.5 / unit, 0.01 / unit], {"A": 7}
        )
        return network.linear_noise().covariance(torch.tensor([0.5, 1.0], dtype=torch.float64) * unit)

    testing.check_units(answer, factors=(1e-9, 1e9))
    burst = ReactionNetwork(["2 A -> 3 A", "A -> 0"], [10.0, 1.0], {"A": 10}).linear_noise()
    with pytest.raises(NonFiniteError, match="leaves all bounds"):
        burst.mean([1.0])


def test_rate_constants_move_with_the_network_and_take_the_precision_of_counts() -> None:
    testing.check_device(immigration())
    testing.check_storage(immigration(), lambda network: network.sample([0.0, 1.0], 5, 0).x)
    many = ReactionNetwork(["0 -> A", "A -> 0"], [300.0, 0.5], {"A": 600})
    for dtype in (torch.float32, torch.float64):
        law = sd.DiffusionMeasure(torch.tensor([600.0], dtype=dtype), many.langevin())
        assert law.sample(torch.linspace(0, 1, 5, dtype=dtype), 3, 0).x.dtype == dtype


def test_mass_action_is_combinatorial() -> None:
    network = ReactionNetwork(["2 A -> B", "A + B -> 0"], [2.0, 3.0], {"A": 5})
    x = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(
        network.propensities(x), torch.tensor([[20.0, 60.0], [0.0, 6.0], [0.0, 0.0]]).double()
    )
    own = ReactionNetwork(["A -> 0"], [lambda x: x[..., 0] / (1 + x[..., 0])], {"A": 5})
    assert float(own.propensities(torch.tensor([4.0]).double())) == pytest.approx(0.8)


def test_time_may_be_in_any_unit() -> None:
    fast = ReactionNetwork(["0 -> A", "A -> 0"], [LAM * 1e9, MU * 1e9], {"A": START})
    a, b = immigration().truncate({"A": 60}).marginal(T), fast.truncate({"A": 60}).marginal(T * 1e-9)
    torch.testing.assert_close(a.probs, b.probs, rtol=1e-10, atol=1e-15)


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="has one arrow"):
        ReactionNetwork(["A"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="can't be read"):
        ReactionNetwork(["2A+ -> B"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="must change something"):
        ReactionNetwork(["A -> A"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match=r"rates\[0\]"):
        ReactionNetwork(["A -> 0"], [-1.0], {"A": 1})
    with pytest.raises(ShapeError, match="one rate per reaction"):
        ReactionNetwork(["A -> 0"], [1.0, 2.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="no reaction has"):
        ReactionNetwork(["A -> 0"], [1.0], {"B": 1})
    with pytest.raises(SystemSizeError):
        gene().truncate({"Off": 1000, "On": 1000, "P": 1000})
    with pytest.raises(InvalidInputError, match="outside the bounds"):
        immigration().truncate({"A": 3})


def test_next_reactions_have_the_exact_moments() -> None:
    x = immigration().sample([0.3, 1.3], 10_000, 0, method="next_reaction").x[..., 0]
    for k, t in enumerate((0.3, 1.3)):
        mean, variance = exact_moments(t)
        assert abs(float(x[:, k].mean()) - mean) < 4.5 * (variance / 10_000) ** 0.5
        assert abs(float(x[:, k].var()) - variance) < 0.07 * variance


def test_tau_leaping_converges_at_first_order() -> None:
    """The mean of immigration and death under leaps is that of Euler's method: the bias halves with the step."""
    network = ReactionNetwork(["0 -> A", "A -> 0"], [150.0, 0.5], {"A": 900})
    exact = 900 * math.exp(-0.65) + 300 * (1 - math.exp(-0.65))
    for dt in (0.65, 0.325):
        x = network.sample([1.3], 4000, 0, method=TauLeaping(dt=dt)).x[:, 0, 0]
        steps = round(1.3 / dt)
        euler = 300 + 600 * (1 - 0.5 * dt) ** steps
        error = float(x.std()) / 4000**0.5
        assert abs(float(x.mean()) - euler) < 4.5 * error
        assert abs(euler - exact) > 6 * error
    x = network.sample([1.3], 4000, 0, method="tau").x[:, 0, 0]
    assert float(x.mean()) == pytest.approx(exact, rel=0.02)


def test_approximations_have_the_order_of_their_theory_in_the_size_of_a_system() -> None:
    """Births and deaths in pairs in volumes of 20 and 40: errors relative to the exact steady state fall as theory has it.

    Means by the linear noise approximation as one over the volume, by the Langevin equation and by moment closure as its square;
    variances by all three as one over the volume (Grima, Thomas and Straube, 2011).
    """
    errors = []
    for volume in (20, 40):
        network = ReactionNetwork(["0 -> A", "2 A -> 0"], [4.0 * volume, 2.0 / volume], {"A": volume})
        rates = network.truncate({"A": 4 * volume + 60}).generator.toarray()
        p = RateMatrix(rates - np.diag(rates.diagonal())).stationary()
        n = torch.arange(len(p)).double()
        mean = (p * n).sum()
        variance = (p * (n - mean) ** 2).sum()
        # the steady state of the Langevin equation in closed form, from its own coefficients
        x = torch.linspace(1e-3, 4 * volume + 60, 20_001).double()[:, None]
        sde = network.langevin()
        drift = sde.drift(torch.tensor(0.0), x)[:, 0]
        square = sde.diffusion(torch.tensor(0.0), x).value.square().sum((-1, -2))
        slope = torch.cumulative_trapezoid(2 * drift / square, x[:, 0])
        density = torch.exp(torch.cat([slope.new_zeros(1), slope]) - slope.max()) / square
        density = density / torch.trapezoid(density, x[:, 0])
        langevin = torch.trapezoid(density * x[:, 0], x[:, 0])
        spread = torch.trapezoid(density * (x[:, 0] - langevin) ** 2, x[:, 0])
        noise, closed = network.linear_noise(), network.moments([6.0])
        errors.append(
            [
                float(noise.mean([6.0])[0, 0] / mean - 1),
                float(langevin / mean - 1),
                float(closed.mean[0, 0] / mean - 1),
                float(noise.covariance([6.0])[0, 0, 0] / variance - 1),
                float(spread / variance - 1),
                float(closed.covariance[0, 0, 0] / variance - 1),
            ]
        )
    steps = np.log2(np.abs(np.array(errors[1:]) / np.array(errors[:-1])))
    np.testing.assert_allclose(steps[0], [-1.0, -2.0, -2.0, -1.0, -1.0, -1.0], atol=0.06)


def test_one_gene_under_every_approximation() -> None:
    """All propensities of a switching gene are linear: linear noise is exact, and leaps are as good as they are short."""
    exact = gene().truncate({"Off": 1, "On": 1, "P": 80}).marginal(2.0)
    noise = gene().linear_noise()
    torch.testing.assert_close(noise.mean([2.0])[0], exact.mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(noise.covariance([2.0])[0], exact.covariance, rtol=1e-7, atol=1e-9)
    x = gene().sample([2.0], 20_000, 0, method=TauLeaping(dt=0.02)).x[:, 0]
    error = (exact.covariance.diagonal() / 20_000).sqrt()
    # of what is left of the first order in the leap: a fiftieth of a relaxation time
    assert ((x.mean(0) - exact.mean).abs() < 3 * error + 0.02 * exact.mean).all()
    direct = gene().sample([2.0], 20_000, 1).x[:, 0]
    assert ((direct.mean(0) - exact.mean).abs() < 4 * error).all()


def test_leaps_never_make_counts_negative() -> None:
    network = ReactionNetwork(["2 A -> B", "A -> 0"], [0.5, 1.0], {"A": 40})
    x = network.sample([0.1, 0.5, 3.0], 500, 0, method=TauLeaping(dt=0.5)).x
    assert (x >= 0).all()
    assert (x[..., 0] + 2 * x[..., 1] <= 40).all()


def test_moment_closure_is_exact_for_linear_propensities() -> None:
    moments = immigration().moments([0.5, T])
    mean, variance = exact_moments(T)
    assert float(moments.mean[1]) == pytest.approx(mean, abs=1e-7)
    assert float(moments.covariance[1]) == pytest.approx(variance, abs=1e-7)
    last = gene().moments([30.0])
    assert float(last.mean[0, 2]) == pytest.approx(3.6, rel=1e-6)
    assert float(last.covariance[0, 2, 2]) == pytest.approx(13.68, rel=1e-6)


def test_moment_closure_knows_of_the_fluctuations() -> None:
    """After take-off of an epidemic it is closer to the exact mean than linear noise: 24.341 at t = 20."""
    network = ReactionNetwork(["S + I -> 2 I", "I -> R"], [0.3 / 100, 0.1], {"S": 80, "I": 20})
    closed = float(network.moments([20.0]).mean[0, 1])
    linear = float(network.linear_noise().mean([20.0])[0, 1])
    assert linear == pytest.approx(24.557, abs=0.01)
    assert abs(closed - 24.341) < 0.2 * abs(linear - 24.341)


def test_slopes_are_derivatives() -> None:
    network = ReactionNetwork(
        ["3 A + B -> C", "2 B -> A", "0 -> C", lambda_reaction()],
        [1.0, 2.0, 3.0, lambda x: x[..., 0] ** 2],
        {"A": 3},
    )
    x = torch.tensor([[1.7, 2.4, 0.3], [0.2, 5.0, 1.0]]).double()
    exact = torch.stack(
        [torch.func.jacfwd(lambda m: network.unit_propensities(m, whole=False))(row) for row in x]
    )
    torch.testing.assert_close(network.unit_slopes(x), exact)


def lambda_reaction() -> str:
    """A reaction whose propensity is a function."""
    return "A -> 0"


def test_means_of_dimers_are_continuous() -> None:
    network = ReactionNetwork(["2 A -> B"], [2.0], {"A": 5})
    at = torch.tensor([[1.5, 0.0]]).double()
    torch.testing.assert_close(network.mean_field(at), torch.tensor([[-1.5, 0.75]]).double())


def test_rates_are_learnt_from_counts() -> None:
    network = immigration()
    ts = torch.arange(1, 13).double() * 0.7
    y = network.sample(ts, (), 1).x[:, 0]
    exact = fit_reactions(network, ts, {"A": y}, StateProjection({"A": 30}), prior=(0.5, 0.7), num_draws=400)
    truth = torch.tensor([LAM, MU]).double().log()
    assert ((exact.draws.mean(0) - truth).abs() < 3.5 * exact.draws.std(0)).all()
    assert exact.khat < 0.7
    assert "leaves out nothing but the mass" in exact.report()
    # the density at the mean agrees with the public log-likelihood
    again = ReactionNetwork(["0 -> A", "A -> 0"], exact.draws.mean(0).exp().tolist(), {"A": START})
    direct = again.truncate({"A": 30}).log_likelihood(ts, {"A": y})
    batch = StateProjection({"A": 30}).log_likelihood(
        network, ts, {"A": y}, exact.draws.mean(0, keepdim=True).exp(), torch.Generator()
    )
    assert float(batch) == pytest.approx(float(direct), rel=1e-10)
    linear = fit_reactions(network, ts, {"A": y}, LinearNoise(), prior=(0.5, 0.7), num_draws=400)
    assert ((linear.draws.mean(0) - exact.draws.mean(0)).abs() < 0.5 * exact.draws.std(0)).all()
    assert "whole" in linear.leaves_out


def test_a_particle_filter_is_unbiased_for_the_exact_likelihood() -> None:
    network, ts = immigration(), torch.tensor([0.5, 1.0, 1.5]).double()
    counts = {"A": torch.tensor([6.0, 8.0, 7.0]).double()}
    constants = torch.tensor([[LAM, MU]]).double()
    exact = StateProjection({"A": 50}, obs_scale=1.0).log_likelihood(
        network, ts, counts, constants, torch.Generator()
    )
    filters = ParticleFilter(1.0, num_particles=200)
    values = filters.log_likelihood(
        network, ts, counts, constants.expand(300, -1), torch.Generator().manual_seed(0)
    )
    ratio = (values - exact).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / 300**0.5


def test_a_leaking_projection_warns_and_impossible_counts_raise() -> None:
    network, ts = immigration(), torch.tensor([1.0, 2.0]).double()
    with pytest.warns(UserWarning, match="truncation leaks"):
        fit_reactions(network, ts, {"A": [7, 8]}, StateProjection({"A": 8}), num_draws=20)
    pure_death = ReactionNetwork(["A -> 0"], [0.5], {"A": 4})
    with pytest.raises(sd.errors.ZeroProbabilityError, match="impossible"):
        fit_reactions(pure_death, ts, {"A": [3, 4]}, StateProjection({"A": 5}))
    with pytest.raises(InvalidInputError, match="unknown species"):
        fit_reactions(network, ts, {"B": [3, 4]}, StateProjection({"A": 5}))
    with pytest.raises(InvalidInputError, match="make a count negative"):
        ReactionNetwork(["A -> 0"], [lambda x: torch.ones_like(x[..., 0])], {"A": 2}).truncate({"A": 5})


def test_a_network_is_read_from_sbml() -> None:
    pytest.importorskip("libsbml")
    text = """<?xml version="1.0" encoding="UTF-8"?>
<sbml xmlns="http://www.sbml.org/sbml/level3/version1/core" level="3" version="1"><model id="m">
<listOfCompartments><compartment id="c" size="1" constant="true"/></listOfCompartments>
<listOfSpecies><species id="A" compartment="c" initialAmount="7" hasOnlySubstanceUnits="true"
 boundaryCondition="false" constant="false"/></listOfSpecies>
<listOfParameters><parameter id="lam" value="3" constant="true"/><parameter id="mu" value="0.5" constant="true"/></listOfParameters>
<listOfReactions>
<reaction id="birth" reversible="false" fast="false"><listOfProducts>
<speciesReference species="A" stoichiometry="1" constant="true"/></listOfProducts>
<kineticLaw><math xmlns="http://www.w3.org/1998/Math/MathML"><ci> lam </ci></math></kineticLaw></reaction>
<reaction id="death" reversible="false" fast="false"><listOfReactants>
<speciesReference species="A" stoichiometry="1" constant="true"/></listOfReactants>
<kineticLaw><math xmlns="http://www.w3.org/1998/Math/MathML"><apply><times/><ci> mu </ci><ci> A </ci></apply></math></kineticLaw></reaction>
</listOfReactions></model></sbml>"""
    network = ReactionNetwork.from_sbml(text)
    ours = immigration().truncate({"A": 60}).marginal(T).probs
    torch.testing.assert_close(network.truncate({"A": 60}).marginal(T).probs, ours, rtol=1e-12, atol=1e-15)
    assert np.isfinite(network.sample([0.5], 3, 0).x.numpy()).all()


def test_linear_noise_takes_steps_for_the_fastest_rate_on_the_way() -> None:
    # An epidemic is slow at its start and fast later: one look after twelve days sees what looks on every day see.
    epidemic = ReactionNetwork(
        ["S + I -> I + I", "I -> R"], rates=[3.0 / 763, 0.5], initial={"S": 762, "I": 1}
    )
    nan = float("nan")
    constants = torch.tensor([[3.0 / 763, 0.5], [12.0 / 763, 0.5]], dtype=torch.float64)
    values = []
    for times in ([12.0], [0.5 * k for k in range(1, 25)]):
        at, seen = checked_counts(epidemic, times, {"I": [nan] * (len(times) - 1) + [40.0]})
        values.append(LinearNoise(5.0).log_likelihood(epidemic, at, seen, constants, torch.Generator()))
    assert torch.allclose(values[0], values[1], rtol=1e-3)


def test_linear_noise_of_an_explosion_has_likelihood_zero() -> None:
    chain = ReactionNetwork(["A + A -> A + A + A", "A -> 0"], rates=[1e-3, 1.0], initial={"A": 10})
    at, seen = checked_counts(chain, [1.0, 2.0], {"A": [8.0, 7.0]})
    constants = torch.tensor([[1e-3, 1.0], [10.0, 1.0]], dtype=torch.float64)
    calm, burst = LinearNoise(1.0).log_likelihood(chain, at, seen, constants, torch.Generator()).tolist()
    assert math.isfinite(calm)
    assert burst == -math.inf
