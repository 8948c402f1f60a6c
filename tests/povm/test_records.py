"""Measurement records: their law, their simulation, and posteriors against sums over a grid."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from scipy import stats
from torch import Tensor

import stochdyn as sd
from stochdyn.core import encode
from stochdyn.errors import (
    ConvergenceWarning,
    EmptyDataError,
    InvalidInputError,
    ShapeError,
    SystemSizeError,
    TimeGridError,
)
from stochdyn.povm import (
    Basis,
    FourPauli,
    Lindbladian,
    MeasurementRecords,
    Pauli6,
    Preparations,
    Propagator,
    ReadoutError,
    RecordLaw,
    RecordModel,
    SiteFrames,
    Tetrahedral,
    Unmeasured,
    exact,
    infer_parameters,
    ring,
    simulate_records,
    systems,
)
from stochdyn.povm.records.goodness import warn_of_chains

F64 = torch.float64
TIMES = [0.4, 0.8, 1.2, 1.6, 2.0]
PRIORS = {name: dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0) for name in ("field", "decay")}


def two_sites() -> Lindbladian:
    return Lindbladian(2, [("0.5*field", "X", "all"), (0.5, "ZZ", (0, 1))], [("decay", "sigma-", "all")])


def data(n: int, seed: int = 1, times: list[float] | None = None) -> MeasurementRecords:
    generator = torch.Generator().manual_seed(seed)
    truth = two_sites().bind(field=1.2, decay=0.8)
    return simulate_records(truth, Tetrahedral(), "up", times or TIMES, n, generator=generator)


def test_records_are_listed_by_time() -> None:
    a = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[3, 3]])]
    records = MeasurementRecords.of([0.1, 0.2], a)
    assert (len(records), records.num_sites) == (3, 2)
    assert records.time_index.tolist() == [0, 0, 1]
    counts = records.counts()
    assert counts.shape == (2, 16)
    assert counts[0, [1, 11]].tolist() == [1, 1]
    assert counts[1, 15] == 1
    assert counts.sum() == 3


def test_simulated_records_follow_the_master_equation() -> None:
    records = data(4000)
    p = exact.propagate(two_sites().bind(field=1.2, decay=0.8), Tetrahedral(), "up", [0.0, *TIMES])[1:]
    counts = records.counts().double()
    values = [stats.chisquare(c, 4000 * q / q.sum()).pvalue for c, q in zip(counts, p, strict=True)]
    # Fisher's combination; the chance of a false alarm is 1e-4
    assert stats.combine_pvalues(values).pvalue > 1e-4
    again = data(4000)
    assert torch.equal(again.outcomes, records.outcomes)
    assert simulate_records(systems.ising(2), FourPauli(), "up", [0.0], 5).outcomes.shape == (5, 2)


def test_the_law_of_records() -> None:
    law = Propagator(two_sites(), Tetrahedral(), "up", TIMES)
    records = data(20)
    p = law(field=1.0, decay=0.5)
    single = RecordLaw(p, records.time_index, 2)
    assert single.batch_shape == (100,)
    code = encode(records.outcomes, 4)
    torch.testing.assert_close(single.log_prob(records.outcomes), p[records.time_index, code].log())
    field = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    many = RecordLaw(law(field=field, decay=0.5), records.time_index, 2)
    assert many.batch_shape == (3, 100)
    torch.testing.assert_close(many.log_prob(records.outcomes)[0], single.log_prob(records.outcomes))
    assert many.sample((7,)).shape == (7, 3, 100, 2)
    assert many.log_prob(many.sample((7,))).shape == (7, 3, 100)
    wide = single.expand((4, 100))
    torch.testing.assert_close(wide.log_prob(records.outcomes)[2], single.log_prob(records.outcomes))
    with pytest.raises(ShapeError, match="can't be expanded"):
        single.expand((50,))
    with pytest.raises(ValueError, match="support"):
        RecordLaw(p, records.time_index, 2, validate_args=True).log_prob(records.outcomes + 9)


def test_drawn_records_follow_the_law() -> None:
    p = Propagator(two_sites(), Tetrahedral(), "up", [0.5, 1.0])(field=1.0, decay=0.5)
    law = RecordLaw(p, torch.tensor([0, 1]), 2)
    code = encode(law.sample((8000,)), 4)
    values = [
        stats.chisquare(torch.bincount(code[:, t], minlength=16), 8000 * p[t] / p[t].sum()).pvalue
        for t in range(2)
    ]
    assert stats.combine_pvalues(values).pvalue > 1e-4


def test_the_score_of_the_truth_has_mean_zero_and_the_fisher_information_for_variance() -> None:
    law = Propagator(two_sites(), Tetrahedral(), "up", TIMES)
    truth = torch.tensor([1.2, 0.8], dtype=F64)

    def table(v: Tensor) -> Tensor:
        return law(field=v[0], decay=v[1])

    p = table(truth)
    slope = torch.autograd.functional.jacobian(table, truth)  # (T, S, 2)
    score = slope / p[..., None]
    assert float(torch.einsum("ts,tsk->tk", p, score).abs().max()) < 1e-10
    fisher = torch.einsum("ts,tsk,tsl->kl", p, score, score)
    records = data(20_000)
    drawn = score[records.time_index, encode(records.outcomes, 4)]
    covariance = drawn.T @ drawn / 20_000
    # five times 20000 records: relative errors of second moments are below one per cent
    torch.testing.assert_close(covariance, fisher, rtol=0.05, atol=0.01 * float(fisher.max()))


def grid_posterior(records: MeasurementRecords) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (field, decay) by summation over a fine grid."""
    field = torch.linspace(0.7, 1.7, 121, dtype=F64)[:, None]
    decay = torch.linspace(0.5, 1.2, 121, dtype=F64)
    p = Propagator(two_sites(), Tetrahedral(), "up", records.times)(field=field, decay=decay)
    log = (records.counts().double() * p.log()).sum((-1, -2))
    log = log + PRIORS["field"].log_prob(field) + PRIORS["decay"].log_prob(decay)
    weight = (log - log.logsumexp((0, 1))).exp()
    values = torch.stack(torch.broadcast_tensors(field, decay), -1)
    mean = (weight[..., None] * values).sum((0, 1))
    return mean, ((weight[..., None] * (values - mean).square()).sum((0, 1))).sqrt()


def draws_of(idata) -> Tensor:
    columns = [torch.tensor(idata.posterior[name].values).flatten() for name in ("field", "decay")]
    return torch.stack(columns, -1)


@pytest.mark.slow
def test_acceptance_of_variational_inference() -> None:
    """Field and decay from 5000 outcomes at five times: the truth inside, and weights that can be trusted."""
    records = data(1000, seed=2)
    idata = infer_parameters(records, two_sites(), Tetrahedral(), "up", PRIORS, seed=0, num_draws=4000)
    assert idata.attrs["khat"] < 0.5
    draws = draws_of(idata)
    low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=F64), dim=0)
    truth = torch.tensor([1.2, 0.8], dtype=F64)
    assert bool(((low < truth) & (truth < high)).all())
    mean, deviation = grid_posterior(records)
    assert float(((draws.mean(0) - mean) / deviation).abs().max()) < 0.1
    assert float((draws.std(0) / deviation - 1).abs().max()) < 0.1
    assert idata.log_likelihood["outcomes"].shape == (1, 4000, 5000)


@pytest.mark.slow
def test_hamiltonian_monte_carlo_finds_the_same_posterior() -> None:
    records = data(1000, seed=2)
    idata = infer_parameters(
        records, two_sites(), Tetrahedral(), "up", PRIORS, method="nuts", num_draws=400, warmup=200
    )
    draws = draws_of(idata)
    mean, deviation = grid_posterior(records)
    # 400 draws, of which at least a quarter count as independent
    assert float(((draws.mean(0) - mean) / deviation).abs().max()) < 4.5 / 100**0.5
    assert "diverging" in idata.sample_stats


def test_short_inference_finds_a_decay_rate() -> None:
    model = Lindbladian(1, [], [("decay", "sigma-", 0)])
    generator = torch.Generator().manual_seed(0)
    records = simulate_records(
        model.bind(decay=0.8), Tetrahedral(), "up", [0.5, 1.0], 500, generator=generator
    )
    prior = {"decay": PRIORS["decay"]}
    idata = infer_parameters(records, model, Tetrahedral(), "up", prior, steps=100, num_draws=200)
    grid = torch.linspace(0.3, 1.5, 400, dtype=F64)
    p = Propagator(model, Tetrahedral(), "up", [0.5, 1.0])(decay=grid)
    log = (records.counts().double() * p.log()).sum((-1, -2)) + prior["decay"].log_prob(grid)
    weight = torch.softmax(log, 0)
    mean = (weight * grid).sum()
    deviation = (weight * (grid - mean).square()).sum().sqrt()
    draws = torch.tensor(idata.posterior["decay"].values).flatten()
    assert abs(float((draws.mean() - mean) / deviation)) < 0.4  # 200 draws, and the fit's own error
    assert idata.attrs["khat"] < 0.7
    assert idata.attrs["inference_library"] == "stochdyn"
    assert idata.observed_data["outcomes"].shape == (1000, 1)


def test_the_model_works_with_plain_pyro() -> None:
    records = data(10)
    program = RecordModel(two_sites(), Tetrahedral(), "up", records.times, PRIORS)
    trace = poutine.trace(program).get_trace(records)
    assert {"field", "decay"} <= set(trace.stochastic_nodes)
    assert trace.nodes["outcomes"]["fn"].batch_shape == (50,)
    drawn = Predictive(poutine.uncondition(program), num_samples=3)(records)
    assert drawn["outcomes"].shape[-2:] == (50, 2)


def test_records_of_a_network_enter_a_pyro_model() -> None:
    net = sd.povm.FullTable(2)
    records = data(200)
    first = records.outcomes[records.time_index == 0]

    def model() -> None:
        with pyro.plate("record", len(first)):
            pyro.sample("a", net.distribution().expand([len(first)]), obs=first)

    total = poutine.trace(model).get_trace().log_prob_sum()
    torch.testing.assert_close(total, net.log_prob(first).sum())


GOOD = data(5)
BAD = {
    "times that fall": (lambda: data(5, times=[1.0, 0.5]), TimeGridError, "increase strictly"),
    "a time before the start": (lambda: data(5, times=[-1.0, 0.5]), InvalidInputError, "start at zero"),
    "no records": (lambda: data(0), InvalidInputError, "num_records"),
    "too many sites": (
        lambda: simulate_records(systems.ising(12), Tetrahedral(), "up", [1.0], 5), SystemSizeError, r"4\*\*12"),
    "outcomes of too few times": (
        lambda: MeasurementRecords.of([0.0, 1.0], [torch.zeros(2, 2).long()]), ShapeError, "time by time"),
    "outcomes of different sites": (
        lambda: MeasurementRecords.of([0.0, 1.0], [torch.zeros(2, 2).long(), torch.zeros(2, 3).long()]),
        ShapeError, r"\(n, N\)"),
    "outcomes that aren't whole": (
        lambda: MeasurementRecords.of([0.0], [torch.zeros(2, 2)]), InvalidInputError, "integers"),
    "outcomes out of range": (
        lambda: MeasurementRecords.of([0.0], [torch.full((2, 2), 4)]), InvalidInputError, "got 4; expected 0 to 3"),
    "probabilities of another size": (
        lambda: RecordLaw(torch.ones(2, 8) / 8, torch.tensor([0]), 2), ShapeError, "16 outcomes"),
    "records of another lattice": (
        lambda: infer_parameters(GOOD, Lindbladian(3, [("g", "X", 0)]), Tetrahedral(), "up", {}), ShapeError,
        "2 sites with 4 outcomes"),
    "a prior too few": (
        lambda: infer_parameters(GOOD, two_sites(), Tetrahedral(), "up", {"field": PRIORS["field"]}),
        InvalidInputError, r"one prior for each parameter; got \['field'\]"),
    "no parameters": (
        lambda: infer_parameters(GOOD, systems.ising(2), Tetrahedral(), "up", {}), InvalidInputError, "no parameters"),
    "an unknown method": (
        lambda: infer_parameters(GOOD, two_sites(), Tetrahedral(), "up", PRIORS, method="abc"),
        InvalidInputError, "method is unknown"),
    "empty records": (
        lambda: infer_parameters(MeasurementRecords.of([0.0], [torch.zeros(0, 2).long()]), two_sites(), Tetrahedral(),
                                 "up", PRIORS), EmptyDataError, "empty"),
    "a model of nine sites": (
        lambda: RecordModel(Lindbladian(9, [("g", "ZZ", ring(9))]), Tetrahedral(), "up", torch.tensor([1.0]),
                            {"g": PRIORS["field"]}), SystemSizeError, "eight qubits"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


# ------------------------------------------------------------------ as experiments have them


def test_counts_and_bits_become_records() -> None:
    counts = [{"XZ": {"00": 2, "01": 1}}, {"YY": {"11": 1}, "ZZ": {"10": 2}}]
    records = MeasurementRecords.from_counts([0.5, 1.0], counts)
    assert records.outcomes.tolist() == [[0, 4], [0, 4], [0, 5], [3, 3], [5, 4], [5, 4]]
    assert records.time_index.tolist() == [0, 0, 0, 1, 1, 1]
    bits = MeasurementRecords.from_bits([0.5, 1.0], ["XZ", "YY"], [[0, 1], [1, 1]], [0, 1])
    assert bits.outcomes.tolist() == [[0, 5], [3, 3]]
    for bad in ({"XW": {"00": 1}}, {"XZ": {"0": 1}}, {"XZ": {"02": 1}}, {"XZ": {"00": -1}}, {"XZ": 3}):
        with pytest.raises(InvalidInputError):
            MeasurementRecords.from_counts([0.5], [bad])


def test_readout_errors_as_parameters_are_those_of_the_frame() -> None:
    model = Lindbladian(2, [("g", "X", "all"), (0.4, "ZZ", (0, 1))], [(0.3, "sigma-", "all")])
    priors = {"g": dist.LogNormal(0.0, 1.0), "up": dist.Beta(1.0, 9.0), "down": dist.Beta(1.0, 9.0)}
    program = RecordModel(model, Pauli6(), "up", torch.tensor([0.5, 1.0]), priors, ReadoutError("up", "down"))
    up, down = torch.tensor([0.02, 0.1], dtype=F64), torch.tensor([0.05, 0.2], dtype=F64)
    p = program.probabilities({"g": torch.tensor(0.7, dtype=F64), "up": up, "down": down})
    for i in range(2):
        frame = Pauli6((float(up[i]), float(down[i])))
        right = Propagator(model, frame, "up", [0.5, 1.0])(g=0.7)
        torch.testing.assert_close(p[i], right, atol=1e-12, rtol=0)


@pytest.mark.slow
def test_drive_readout_error_and_preparations_are_inferred_together() -> None:
    """A Rabi drive of a bath with thermal jumps, seen from two states with bits misread."""
    model = Lindbladian(1, [("g*cos(t)", "X", 0)], [("gamma*(n+1)", "sigma-", 0), ("gamma*n", "sigma+", 0)])
    truth = {"g": 1.5, "gamma": 0.4, "n": 0.5}
    start = Preparations(["up", "x+"])
    records = simulate_records(model.bind(**truth), Pauli6(0.06), start, [0.4, 0.8, 1.6], 1500, generator=3)
    assert records.num_preparations == 2
    priors = {"g": dist.LogNormal(0.0, 1.0), "gamma": dist.LogNormal(-1.0, 1.0), "n": dist.LogNormal(-1.0, 1.0),
              "flip": dist.Beta(1.0, 9.0)}  # fmt: skip
    idata = infer_parameters(records, model, Pauli6(), start, priors, readout=ReadoutError("flip"), steps=60,
                             num_draws=300, predictive=False, progress=False)  # fmt: skip
    for name, value in {**truth, "flip": 0.06}.items():
        draws = idata.posterior[name].values
        assert abs(draws.mean() - value) < 4.5 * draws.std(), name
    assert idata.attrs["impossible_records"] == 0
    assert idata.attrs["fit_p_value"] > 0.001


def test_records_of_one_basis_and_of_some_sites_are_enough_for_a_likelihood() -> None:
    model = Lindbladian(2, [("g", "X", "all"), (0.4, "ZZ", (0, 1))], [(0.3, "sigma-", "all")])
    seen = SiteFrames([Basis("Z"), Unmeasured()])
    records = simulate_records(model.bind(g=0.8), seen, "up", [0.5, 1.0, 1.5], 2000, generator=0)
    assert int(records.outcomes[:, 1].max()) == 0
    idata = infer_parameters(records, model, seen, "up", {"g": dist.LogNormal(0.0, 1.0)}, steps=100,
                             num_draws=200, predictive=False, progress=False)  # fmt: skip
    draws = idata.posterior["g"].values
    assert abs(draws.mean() - 0.8) < 4.5 * draws.std()


def test_records_that_can_t_be_are_pointed_out() -> None:
    model = Lindbladian(1, [], [("decay", "sigma-", 0)])
    data = simulate_records(model.bind(decay=1.0), Pauli6(0.1), "up", [0.0, 0.5], 300, generator=2)
    with pytest.warns(ConvergenceWarning, match="records are impossible"):
        idata = infer_parameters(data, model, Pauli6(), "up", {"decay": dist.LogNormal(0.0, 1.0)}, steps=30,
                                 num_draws=50, predictive=False, progress=False)  # fmt: skip
    assert idata.attrs["impossible_records"] > 0


def test_probabilities_below_zero_by_more_than_rounding_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="must not be negative"):
        RecordLaw(torch.tensor([[0.6, 0.5, -0.1, 0.0]]), torch.tensor([0]), 1)


@pytest.mark.slow
def test_eight_qubits_have_a_likelihood_and_its_gradient() -> None:
    model = Lindbladian(8, [("g", "X", "all"), (0.5, "ZZ", ring(8))], [(0.5, "sigma-", "all")])
    law = Propagator(model, Pauli6(), "up", [0.2])
    g = torch.tensor(0.7, dtype=F64, requires_grad=True)
    p = law(g=g)
    assert p.shape == (1, 6**8)
    assert float(p.detach().sum()) == pytest.approx(1)
    (slope,) = torch.autograd.grad(p[0, 0].log(), g)
    with torch.no_grad():
        step = 1e-4
        change = (law(g=0.7 + step)[0, 0].log() - law(g=0.7 - step)[0, 0].log()) / (2 * step)
    assert float(slope) == pytest.approx(float(change), rel=1e-4)


def test_readout_errors_may_differ_from_site_to_site() -> None:
    model = Lindbladian(2, [("g", "X", "all")], [(0.3, "sigma-", "all")])
    errors = [ReadoutError("first"), ReadoutError("up", "down")]
    priors = {"g": dist.LogNormal(0.0, 1.0), **{n: dist.Beta(1.0, 9.0) for n in ("first", "up", "down")}}
    program = RecordModel(model, Pauli6(), "up", [0.4, 0.9], priors, errors)
    values = {"g": torch.tensor([0.7, 1.1], dtype=F64), "first": 0.1, "up": 0.05, "down": 0.2}
    known = SiteFrames([Pauli6(0.1), Pauli6((0.05, 0.2))])
    for i, g in enumerate(values["g"]):
        right = Propagator(model, known, "up", [0.4, 0.9])(g=g)
        torch.testing.assert_close(program.probabilities(values)[i], right, atol=1e-12, rtol=0)
    partly = RecordModel(
        model,
        Pauli6(),
        "up",
        [0.4],
        {"g": priors["g"], "first": priors["first"]},
        [ReadoutError("first"), None],
    )
    assert partly.probabilities({"g": 1.0, "first": 0.1}).shape == (1, 36)
    with pytest.raises(ShapeError, match="one entry for each site"):
        RecordModel(model, Pauli6(), "up", [0.4], priors, [ReadoutError("first")])


@pytest.mark.parametrize(
    ("method", "options"), [("svi", {"warmup": 10}), ("svi", {"num_chains": 2}), ("nuts", {"steps": 5})]
)
def test_options_of_another_method_are_refused(method, options) -> None:
    with pytest.raises(InvalidInputError, match="isn't an option of method"):
        infer_parameters(GOOD, two_sites(), Tetrahedral(), "up", PRIORS, method=method, **options)


def test_chains_that_haven_t_mixed_are_said() -> None:
    apart = torch.randn(2, 100) + torch.tensor([[0.0], [3.0]])
    with pytest.warns(ConvergenceWarning, match="R-hat of g"):
        warn_of_chains({"g": apart, "k": torch.randn(2, 100)})
    warn_of_chains({"g": torch.randn(2, 400)})


def test_pulses_of_records_may_be_said_where_they_are() -> None:
    """A pulse of a hundred-thousandth of the span turns a qubit over, where its place is given."""
    model = Lindbladian(1, [(lambda t, area: area / 1e-5 if 0.33 < t < 0.33 + 1e-5 else 0.0, "X", 0)])
    edges = [0.33, 0.33 + 1e-5]
    p = Propagator(model, Basis("Z"), "down", [1.0], breaks=edges)(area=math.pi / 2)
    assert float(p[0, 0]) == pytest.approx(1, abs=1e-6)
    records = simulate_records(model.bind(area=math.pi / 2), Basis("Z"), "down", [1.0], 10, breaks=edges)
    assert records.outcomes.sum() == 0
