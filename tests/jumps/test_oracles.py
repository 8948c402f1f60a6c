"""Jump processes against numbers that were computed independently: in closed form, by quadrature or by other solvers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import poisson

import stochdyn as sd
from stochdyn.errors import ApproximationWarning, InvalidInputError
from stochdyn.jumps import (
    GaussianLevels,
    JumpMeasure,
    PanelData,
    RateMatrix,
    ReactionNetwork,
    TruncatedNetwork,
    fit_rates,
    log_evidence,
    transition,
    transition_generator,
)
from stochdyn.jumps.likelihood import PanelLikelihood
from stochdyn.nonequilibrium import cycle_affinities

D = torch.float64


def matrix(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, dtype=float))


def close(found: Any, known: Any, rtol: float = 1e-9, atol: float = 0.0) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=D), torch.as_tensor(known, dtype=D), rtol=rtol, atol=atol
    )


def ratchet(v: float) -> RateMatrix:
    """The discrete flashing ratchet: three sites in a potential v that is switched on and off at rate one."""
    q = np.zeros((6, 6))
    for i in range(3):
        for j in range(3):
            if i != j:
                q[i, j], q[3 + i, 3 + j] = math.exp(-v * (j - i) / 2), 1.0
        q[i, 3 + i] = q[3 + i, i] = 1.0
    return RateMatrix(matrix(q))


RATCHET: dict[float, dict[str, Any]] = {
    0.0: {
        "stationary": [1 / 6] * 6,
        "relaxation": [1 / 2, 1 / 3, 1 / 3, 1 / 5, 1 / 5],
        "entropy": 0.0,
        "current": 0.0,
        "passage": [0.0, 1.6, 1.6, 1.8, 2.2, 2.2],
        "row": [
            0.16797526150762082,
            0.1676968559959609,
            0.16769685599596076,
            0.1657267947391443,
            0.1654521158806564,
            0.1654521158806564,
        ],
    },
    1.0: {
        "stationary": [
            0.3011915450355107,
            0.13654174778086,
            0.062266707183629214,
            0.20029788625887776,
            0.15913543694521506,
            0.14056667679590715,
        ],
        "relaxation": [
            0.5,
            0.34964477291958523,
            0.2805608239773732,
            0.20503449557309536,
            0.1588536629957447,
        ],
        "entropy": 0.17919362838891092,
        "current": -0.04243737739462028,
        "passage": [
            0.0,
            0.97144829697526,
            0.7899131080307965,
            1.440340351251514,
            1.6832024254953293,
            1.6378186282592133,
        ],
        "row": [
            0.30454518650447143,
            0.13668085250023007,
            0.062142934494841276,
            0.2002957342152151,
            0.15750774711071872,
            0.13882754517452367,
        ],
    },
    2.0: {
        "stationary": [
            0.3964079748550935,
            0.08428216639050314,
            0.019309858754403567,
            0.2241019937137731,
            0.14607054159762564,
            0.12982746468860093,
        ],
        "relaxation": [
            0.5,
            0.31547197009808464,
            0.25867288633434204,
            0.19213746644378174,
            0.08728770812477704,
        ],
        "entropy": 0.5656471741510354,
        "current": -0.08327233709687137,
        "passage": [
            0.0,
            0.6200821026797957,
            0.36206807625315474,
            1.2455375447332375,
            1.4005580704031864,
            1.336054563796526,
        ],
        "row": [
            0.40030863842172343,
            0.08389990070859539,
            0.0191604343692239,
            0.22434213168187697,
            0.14421261817291725,
            0.12807627664566323,
        ],
    },
}


@pytest.mark.parametrize("v", [0.0, 1.0, 2.0])
def test_the_flashing_ratchet(v: float) -> None:
    q, known = ratchet(v), RATCHET[v]
    close(q.stationary(), known["stationary"])
    close(q.relaxation_times(), known["relaxation"])
    close(q.entropy_production(), known["entropy"], atol=1e-15)
    close(q.fluxes()[0, 1], known["current"], atol=1e-15)
    close(q.mean_first_passage(0), known["passage"])
    close(transition(q, 2.5)[0], known["row"])
    close(-q.matrix.diagonal()[:2], [1 + math.exp(-v / 2) + math.exp(-v), 1 + 2 * math.cosh(v / 2)], 1e-12)


def test_a_uniform_cycle_oscillates_and_settles() -> None:
    """Rates 2 and 1/2 around: complex eigenvalues, and yet one stationary law that is approached."""
    q = RateMatrix(matrix([[0, 2, 0.5], [0.5, 0, 2], [2, 0.5, 0]]))
    close(q.entropy_production(), 1.5 * math.log(4), 1e-12)
    close(q.fluxes()[0, 1], 0.5, 1e-12)
    close(q.relaxation_times(), [1 / 3.75, 1 / 3.75], 1e-12)
    close(q.mean_first_passage(0), [0.0, 6 / 7, 4 / 7], 1e-12)
    close(q.mean_first_passage(1), [4 / 7, 0.0, 6 / 7], 1e-12)
    close(transition(q, 40.0), np.full((3, 3), 1 / 3), 1e-12)
    (cycle,) = cycle_affinities(q)
    close(abs(cycle.affinity), 4.1588830833596715, 1e-12)


def test_a_cycle_of_unequal_rates() -> None:
    q = RateMatrix(matrix([[0, 1, 0.3], [0.4, 0, 2], [0.8, 0.5, 0]]))
    close(
        torch.stack([q.mean_first_passage(j) for j in range(3)], -1),
        [
            [0.0, 1.103448275862069, 1.25],
            [1.5566037735849056, 0.0, 0.625],
            [1.3679245283018868, 1.4482758620689655, 0.0],
        ],
        1e-12,
    )
    (cycle,) = cycle_affinities(q)
    close(abs(cycle.affinity), 3.283414346005772, 1e-12)
    # the divergence of two steady laws per time
    other = RateMatrix(matrix([[0, 0.5, 0.6], [0.8, 0, 1], [0.4, 1, 0]]))
    steady, reference = JumpMeasure(q.stationary(), q), JumpMeasure(matrix([1, 1, 1]) / 3, other)
    close(steady.kl(reference, 3.0) - steady.kl(reference, 1.0), 2 * 0.3466359259438706, 1e-12)


def test_the_telegraph_at_rest_and_back() -> None:
    q = RateMatrix(matrix([[0, 0.7], [1.9, 0]]))
    close(q.stationary(), [0.7307692307692311, 0.26923076923076933], 1e-12)
    close(q.mean_first_passage(0), [0.0, 0.5263157894736842], 1e-12)


TIMES, SEEN = [0.2, 0.5, 1.3, 2.0, 3.1], [0.1, -0.3, 1.2, 1.9, 0.4]


def hidden() -> tuple[JumpMeasure, GaussianLevels]:
    law = JumpMeasure(matrix([0.5, 0.3, 0.2]), matrix([[0, 1, 0.3], [0.4, 0, 2], [0.8, 0.5, 0]]))
    return law, GaussianLevels(matrix([0.0, 1.0, 2.0]), 0.5)


def test_noisy_levels_of_three_states() -> None:
    law, levels = hidden()
    post = law.conditioned(TIMES, SEEN, levels)
    for t, p in {
        0.0: [0.872215676282082, 0.06975239880600609, 0.058031924911912044],
        0.35: [0.9605690930620285, 0.027281122022778548, 0.012149784915192871],
        0.9: [0.4939552347701382, 0.34342119870631715, 0.16262356652354468],
        1.65: [0.06376299774996316, 0.34137442378689425, 0.5948625784631426],
        2.6: [0.40055404471933054, 0.17829448899665595, 0.4211514662840136],
        3.5: [0.4770167332835664, 0.28122865769249816, 0.24175460902393542],
    }.items():
        close(post.marginal(t).probs, p, 1e-12)
    tilted = post.rates(0.9)
    close(
        tilted - torch.diag(tilted.diagonal()),
        [
            [0.0, 2.056958028650556, 0.3803160029535499],
            [0.19446191629997212, 0.0, 1.2326163122315528],
            [0.6310541711002167, 0.8112824648487577, 0.0],
        ],
    )
    dwell, jumps = post.expected_statistics(3.5)
    close(dwell, [1.5352292063245103, 0.8642785724680518, 1.1004922212074426])
    close(
        jumps,
        [
            [0.0, 1.4993608538270242, 0.3394893312186394],
            [0.328817811433158, 0.0, 1.5778590000330106],
            [1.1148334306140448, 0.618792216525514, 0.0],
        ],
    )


def test_the_gradient_of_the_evidence_in_every_log_rate() -> None:
    law, levels = hidden()
    log_rates = law.rates(0.0).clamp(min=1e-9).log().requires_grad_()
    off = log_rates.exp() * (1 - torch.eye(3, dtype=D))
    value = log_evidence(JumpMeasure(law.initial, off), [*TIMES, 3.5], [*SEEN, math.nan], levels)
    close(value.detach(), -5.3286682320000605, 1e-12)
    close(
        torch.autograd.grad(value, log_rates)[0],
        [
            [0.0, -0.0358683524974861, -0.12107943067871368],
            [-0.016893617554062712, 0.0, -0.15069814490309308],
            [0.23443965364809072, 0.06854610592179267, 0.0],
        ],
        1e-8,
    )


def test_single_precision_has_four_digits() -> None:
    law, levels = hidden()
    rates = law.rates(0.0).float().requires_grad_()
    small = JumpMeasure(law.initial.float(), rates - torch.diag(rates.diagonal()))
    value = log_evidence(small, TIMES, SEEN, GaussianLevels(levels.levels.float(), 0.5))
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(-5.3286682320000605, rel=1e-4)
    assert torch.isfinite(torch.autograd.grad(value, rates)[0]).all()
    close(transition(ratchet(1.0).matrix.float(), 2.5)[0].double(), RATCHET[1.0]["row"], 1e-4)


def walled(box: TruncatedNetwork) -> RateMatrix:
    """The rates between the counts of a box, without those out of it."""
    return RateMatrix(box.generator.toarray() - np.diag(box.generator.diagonal()))


def test_immigration_and_death() -> None:
    network = ReactionNetwork(["0 -> A", "A -> 0"], [3.0, 0.5], {"A": 7})
    box = network.truncate({"A": 80})
    law = box.marginal(1.3)
    known = {
        0: 0.00032379253609872226,
        3: 0.04948279974448737,
        5: 0.15693302408256965,
        6: 0.18564154031287933,
        7: 0.17524190910292547,
        10: 0.048436644076367635,
        15: 0.0003711701679463972,
    }
    close(law.probs[list(known)], list(known.values()), 1e-12)
    close(law.mean[0], 6.522045776761015, 1e-12)
    close(law.covariance[0, 0], 4.614323225522924, 1e-12)
    linear = network.linear_noise()
    close(linear.mean([1.3])[0, 0], 6.522045776761015, 1e-8)
    close(linear.covariance([1.3])[0, 0, 0], 4.614323225522924, 1e-8)
    # far out it has all its digits, too
    close(walled(box).stationary(), poisson.pmf(np.arange(81), 6.0), 1e-12)


def test_a_switching_gene_in_its_steady_state() -> None:
    reactions = ["Off -> On", "On -> Off", "On -> On + P", "P -> 0"]
    gene = ReactionNetwork(reactions, [0.6, 1.4, 12.0, 1.0], {"Off": 1})
    law = gene.truncate({"Off": 1, "On": 1, "P": 80}).marginal(40.0)
    known = {
        0: 0.24846028673202294,
        1: 0.1434928278418069,
        2: 0.10999276265736595,
        5: 0.06626456047734942,
        10: 0.025566318536829908,
        20: 0.00025880883788715605,
    }
    close(law.probs.sum((0, 1))[list(known)], list(known.values()))


def test_an_epidemic_that_may_not_spread() -> None:
    """Twenty people: the size at the end, and the chance that the first patient infects nobody."""
    epidemic = ReactionNetwork(["S + I -> 2 I", "I -> 0"], [0.3 / 20, 0.1], {"S": 19, "I": 1})
    box = epidemic.truncate({"S": 19, "I": 20})
    start = np.zeros(len(box.grid))
    start[19 * 21 + 1] = 1.0
    end = torch.as_tensor(box.propagate(start, 1500.0)).reshape(20, 21)
    assert int((box.propagate(start, 1.0) > 0).sum()) <= 231
    close(end[19, 0], 0.2597402597402597)
    infected = 20 - torch.arange(20, dtype=D)
    close((end.sum(1) * infected).sum(), 12.008580910708318)
    seen = box.log_likelihood([5.0, 10.0, 15.0, 25.0], {"I": [2, 5, 6, 3]})
    close(seen, -7.933741777579925, 1e-12)


def test_schloegls_model_has_two_wells() -> None:
    """Births .18 n (n - 1) + 2200 and deaths 2.5e-4 n (n - 1) (n - 2) + 37.5 n, whose constants count pairs and triples."""
    network = ReactionNetwork(
        ["2 A -> 3 A", "3 A -> 2 A", "0 -> A", "A -> 0"], [0.36, 1.5e-3, 2200.0, 37.5], {"A": 100}
    )
    q = walled(network.truncate({"A": 900}))
    p = q.stationary()
    n = torch.arange(901, dtype=D)
    close((p * n).sum(), 169.4632840029407)
    close(p[:251].sum(), 0.7722364538108054)
    peak = (p[1:-1] > p[:-2]) & (p[1:-1] > p[2:])
    assert (peak.nonzero()[:, 0] + 1).tolist() == [95, 392]
    close(q.mean_first_passage(400)[100], 28.67191863606855)


def channel() -> RateMatrix:
    """Colquhoun and Hawkes' five states, in 1/s: the first two are open."""
    q = np.zeros((5, 5))
    q[0, 1], q[0, 3] = 50.0, 3000.0
    q[1, 0], q[1, 2] = 2.0 / 3.0, 500.0
    q[2, 1], q[2, 3] = 15000.0, 4000.0
    q[3, 0], q[3, 2], q[3, 4] = 15.0, 50.0, 2000.0
    q[4, 3] = 10.0
    return RateMatrix(matrix(q))


@pytest.mark.parametrize(
    ("inside", "mean", "rates", "longest"),
    [
        ([0, 1], 0.0018765432098766248, [500.65359141992064, 3050.013075246746], 0.03),
        (
            [2, 3, 4],
            0.9926543209873377,
            [0.26389537613373315, 2062.93373518519, 19011.8023694387],
            40.0,
        ),
    ],
)
def test_open_and_shut_times_of_a_channel(
    inside: list[int], mean: float, rates: list[float], longest: float
) -> None:
    """Densities are mixtures of exponentials of known rates, and their means are known."""
    q = channel()
    t = torch.as_tensor(np.geomspace(1e-6, longest, 300))
    f, k = q.dwell_density(inside, t), matrix(rates)
    modes = k * torch.exp(-k * t[:, None])
    share = torch.linalg.lstsq(modes / f[:, None], torch.ones(300, 1, dtype=D)).solution[:, 0]
    close(modes @ share, f, 1e-7)
    close(share.sum(), 1.0, 1e-7)
    close((share / k).sum(), mean, 1e-7)


def test_a_channel_at_rest() -> None:
    q = channel()
    close(
        q.stationary(),
        [
            2.4827141030556463e-05,
            0.0018620355772946602,
            6.206785257648214e-05,
            0.004965428206114956,
            0.9930856412229846,
        ],
    )
    assert abs(float(q.entropy_production())) < 1e-14 * float(q.matrix.abs().max())
    times = [1 / 101.81790480028029, 1 / 2022.119269497693, 1 / 3093.527236981405, 1 / 19408.202255387303]
    close(q.relaxation_times(), times)
    # openings begin in one of the two open states, in these shares
    entry = (q.stationary()[2:, None] * q.matrix[2:, :2]).sum(0)
    close(entry / entry.sum(), [0.07407407407402414, 0.9259259259259758])
    # and end, on average, after the mean time to a shut state
    close((entry / entry.sum() * q.mean_first_passage([2, 3, 4])[:2]).sum(), 0.0018765432098766248)
    shut = (q.stationary()[:2, None] * q.matrix[:2, 2:]).sum(0)
    close((shut / shut.sum() * q.mean_first_passage([0, 1])[2:]).sum(), 0.9926543209873377)


def ring(s: float, d: float) -> RateMatrix:
    up, down = (s + d) / 2, (s - d) / 2
    return RateMatrix(matrix([[0, up, down], [down, 0, up], [up, down, 0]]))


def test_two_generators_of_one_transition_matrix() -> None:
    """Opposite currents, and the same transitions over a unit of time; each names the other."""
    first, second = ring(6.0, 5.0), ring(6.0, -2.2551974569368713)
    p = [0.3333026437731881, 0.3332825700723788, 0.3334147861544333]
    close(transition(first, 1.0)[0], p)
    close(transition(second, 1.0)[0], p)
    close(first.entropy_production(), 11.989476363991852, 1e-12)
    close(second.entropy_production(), 1.7826751951322937, 1e-12)
    assert float(first.fluxes()[0, 1]) * float(second.fluxes()[0, 1]) < 0
    for one, other in ((first, second), (second, first)):
        with pytest.warns(ApproximationWarning, match="same transition probabilities"):
            report = one.embedding_report(1.0)
        gap = [float((alias - other.matrix).abs().max()) for alias in report["aliases"]]
        assert min(gap) < 1e-9


def test_transitions_that_no_generator_has() -> None:
    with pytest.raises(InvalidInputError, match=r"determinant -0.7"):
        transition_generator([[0.1, 0.9], [0.8, 0.2]], 1.0)
    p = [[0.7, 0.28, 0.02], [0.05, 0.7, 0.25], [0.3, 0.05, 0.65]]
    with pytest.raises(InvalidInputError, match=r"a rate of -0.0458 from 0 to 2"):
        transition_generator(p, 1.0)


LINKS = ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3))


def test_heart_transplants() -> None:
    """The panel of 622 patients of Papworth hospital; the fit that is published with the R package msm, and more of its digits."""
    panel = PanelData(sd.datasets.heart_transplants()._asdict(), "subject", "years", "state", exact_entry=[4])
    # deaths are seen at their times, so nobody is counted as staying dead
    close(panel.counts()[:3], [[1367, 204, 44, 148], [46, 134, 54, 48], [4, 13, 107, 55]], 0.0)
    mask = np.zeros((4, 4), dtype=bool)
    start = np.zeros((4, 4))
    for (i, j), rate in zip(LINKS, (0.25, 0.25, 0.166, 0.166, 0.166, 0.25, 0.25), strict=True):
        mask[i, j], start[i, j] = True, rate
    value = PanelLikelihood(panel.gaps, 4)(RateMatrix(matrix(start)).matrix[None, None])
    close(-2 * value[0], 4908.816768359025, 1e-12)
    fit = fit_rates(panel, mask, num_draws=0)
    close(-2 * fit.log_likelihood, 3968.7979, 1e-8)
    known = [0.12787, 0.04249, 0.22510, 0.34260, 0.04027, 0.13062, 0.30646]
    close([float(fit.rates[i, j]) for i, j in LINKS], known, 0.0, 6e-6)
    close(-1 / fit.rates.diagonal()[:3], [5.870, 1.645, 2.288], 0.0, 6e-4)
    close(transition(fit.rates, 10.0)[0], [0.309425, 0.097503, 0.087873, 0.505199], 0.0, 2e-6)
