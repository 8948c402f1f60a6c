"""Rates of panels: the heart-transplant panel, three ways to one likelihood, calibration, covariates and identifiability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError
from stochdyn.jumps import PanelData, fit_rates, transition
from stochdyn.jumps.likelihood import PanelLikelihood

D = torch.float64
PROGRESSIVE = ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3))


def transplants() -> tuple[PanelData, np.ndarray]:
    panel = PanelData(sd.datasets.heart_transplants()._asdict(), "subject", "years", "state", exact_entry=[4])
    mask = np.zeros((4, 4), dtype=bool)
    for i, j in PROGRESSIVE:
        mask[i, j] = True
    return panel, mask


def test_heart_transplants_have_the_exact_maximum_and_posterior() -> None:
    """Both were computed independently, by another optimiser and 1000 other weighted draws."""
    panel, mask = transplants()
    fit = fit_rates(panel, mask, prior=(-1.0, 1.5), seed=0)
    assert -2 * fit.log_likelihood <= 3968.799
    known = {(0, 1): 0.12787, (1, 2): 0.34260, (2, 3): 0.30646}
    for (i, j), rate in known.items():
        assert float(fit.rates[i, j]) == pytest.approx(rate, rel=2e-4)
    mean = torch.tensor([-2.0539, -3.1681, -1.4926, -1.0909, -3.1550, -2.0291, -1.2172], dtype=D)
    std = torch.tensor([0.0723, 0.1090, 0.1482, 0.1075, 0.5120, 0.2497, 0.1268], dtype=D)
    # a tenth of a standard deviation, and four standard errors of the two samples of some 500 and 1000
    assert (((fit.draws.mean(0) - mean) / std).abs() < 0.1 + 4 * math.sqrt(1 / 464 + 1 / 1000)).all()
    torch.testing.assert_close(fit.draws.std(0), std, rtol=0.2, atol=0)
    assert fit.khat < 0.7
    assert not fit.moved


def test_three_ways_to_the_likelihood_agree() -> None:
    """Whole matrices, seen entries alone, and one generator per transition are the same number, and so is its definition."""
    panel, _ = transplants()
    gaps = panel.gaps
    q = torch.rand(5, 4, 4, dtype=D, generator=torch.Generator().manual_seed(0)) * 0.5
    q[:, 3] = 0.0
    q = q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))
    q = q - torch.diag_embed(q.sum(-1))
    likelihood = PanelLikelihood(gaps, 4)
    by_kind = likelihood(q[None])
    whole = torch.stack([likelihood(one[None, None])[0] for one in q])
    single = likelihood._one_by_one(q[None])
    p = transition(q[0], gaps.dt)[torch.arange(len(gaps.dt)), gaps.before]
    entered = (p * (q[0] - torch.diag(q[0].diagonal())).T[gaps.after]).sum(-1)
    plain = p.gather(1, gaps.after[:, None])[:, 0]
    direct = torch.where(gaps.entered, entered, plain).log().sum()
    torch.testing.assert_close(by_kind, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(single, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(direct, whole[0], rtol=1e-12, atol=0)


def test_a_covariate_is_a_hazard_ratio() -> None:
    """Two groups, fitted apart and with an indicator, are the same model in other coordinates."""
    rows: dict[str, list] = {"id": [], "t": [], "s": [], "x": []}
    source = torch.Generator().manual_seed(0)
    for k in range(60):
        group = k % 2
        p = transition([[0.0, 0.5 * (1 + group)], [0.8, 0.0]], 0.7)
        state = 0
        for step in range(12):
            rows["id"].append(k)
            rows["t"].append(0.7 * step)
            rows["s"].append(state)
            rows["x"].append(float(group))
            state = int(torch.multinomial(p[state], 1, generator=source))
    together = fit_rates(PanelData(rows, "id", "t", "s", covariates=["x"]), num_draws=50)
    parts = []
    for group in (0.0, 1.0):
        chosen = [i for i, x in enumerate(rows["x"]) if x == group]
        part = {name: [values[i] for i in chosen] for name, values in rows.items()}
        parts.append(fit_rates(PanelData(part, "id", "t", "s"), num_draws=50))
    assert together.log_likelihood == pytest.approx(sum(f.log_likelihood for f in parts), abs=1e-6)
    torch.testing.assert_close(together.rates, parts[0].rates, rtol=1e-4, atol=0)
    ratio = parts[1].rates[0, 1] / parts[0].rates[0, 1]
    assert together.draws.shape == (50, 4)
    assert abs(float(together.draws[:, 2].mean()) - math.log(ratio)) < 4 * float(together.draws[:, 2].std())


def test_labels_may_name_states_that_never_occur() -> None:
    rows = {"id": [1, 1, 1], "t": [0.0, 1.0, 2.0], "s": ["a", "b", "a"]}
    panel = PanelData(rows, "id", "t", "s", labels=["a", "b", "c"])
    assert panel.num_states == 3
    assert panel.counts()[2].sum() == 0
    with pytest.raises(InvalidInputError, match="labels don't name"):
        PanelData(rows, "id", "t", "s", labels=["a", "c"])


def test_dates_and_numbers_give_the_same_rates() -> None:
    days = [0, 1, 2, 3, 0, 1, 2, 3]
    rows = {"id": [1] * 4 + [2] * 4, "t": days, "s": [0, 1, 0, 0, 1, 0, 1, 1]}
    numbers = fit_rates(PanelData(rows, "id", "t", "s"), num_draws=20)
    rows["t"] = [np.datetime64("2020-01-01") + np.timedelta64(d, "D") for d in days]
    dates = fit_rates(PanelData(rows, "id", "t", "s"), num_draws=20)
    torch.testing.assert_close(dates.rates, numbers.rates, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_posteriors_are_calibrated() -> None:
    """Ranks of true log rates among posterior draws are uniform: 120 data sets of three states."""
    from scipy.stats import kstest

    ranks, inside = [], []
    for seed in range(120):
        source = torch.Generator().manual_seed(seed)
        log_rates = torch.randn(3, 3, dtype=D, generator=source)
        p = transition(log_rates.exp().fill_diagonal_(0.0), 0.2)
        state = torch.randint(3, (20,), generator=source)
        states = [state]
        for _ in range(49):
            state = torch.multinomial(p[state], 1, generator=source)[:, 0]
            states.append(state)
        y = torch.stack(states, -1)
        frame = {
            "id": np.repeat(np.arange(20), 50),
            "t": np.tile(np.arange(50) * 0.2, 20),
            "s": y.reshape(-1).numpy(),
        }
        fit = fit_rates(PanelData(frame, "id", "t", "s", labels=range(3)), prior=(0.0, 1.0), seed=seed)
        rank = (fit.draws < log_rates[fit.links[:, 0], fit.links[:, 1]]).double().mean(0)
        ranks.append(float(rank[seed % 6]))
        inside += ((rank - 0.5).abs() < 0.475).tolist()
    assert kstest(ranks, "uniform").pvalue > 0.001
    assert 0.92 < np.mean(inside) < 0.98
