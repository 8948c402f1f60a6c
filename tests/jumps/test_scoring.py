"""Fisher scoring: score and information against derivatives of the likelihood, and maxima that are maxima in any unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.jumps import PanelData, fit_rates, transition
from stochdyn.jumps import scoring as scoring_module
from stochdyn.jumps.likelihood import PanelLikelihood
from stochdyn.jumps.scoring import PanelScore

D = torch.float64
LINKS = torch.tensor([[0, 1], [0, 3], [1, 0], [1, 2], [1, 3], [2, 1], [2, 3]])


def generators(log_rates: torch.Tensor) -> torch.Tensor:
    """Generators ``(G, 4, 4)`` of log rates ``(G, 7)``."""
    off = log_rates.new_zeros(len(log_rates), 4, 4)
    off = off.index_put((torch.arange(len(log_rates))[:, None], LINKS[:, 0], LINKS[:, 1]), log_rates.exp())
    return off - torch.diag_embed(off.sum(-1))


def transplants(subjects: int = 622, **change: Any) -> tuple[PanelData, np.ndarray]:
    """The heart-transplant panel of the first subjects, with columns changed or added."""
    data = sd.datasets.heart_transplants()._asdict() | change
    labels = data.pop("labels", None)
    rows = np.isin(np.asarray(data["subject"]), np.unique(np.asarray(data["subject"]))[:subjects])
    data = {name: np.asarray(column)[rows] for name, column in data.items()}
    extra: dict[str, Any] = {"covariates": ["x"]} if "x" in change else {}
    extra["labels"] = labels
    mask = np.zeros((4, 4), dtype=bool)
    mask[LINKS[:, 0], LINKS[:, 1]] = True
    return PanelData(data, "subject", "years", "state", exact_entry=[4], **extra), mask


@pytest.mark.parametrize("fast", [0.0, 6.0])
@pytest.mark.parametrize("few", [8, 0])
def test_the_score_is_the_derivative_of_the_likelihood(
    monkeypatch: pytest.MonkeyPatch, few: int, fast: float
) -> None:
    """By powers and, at rates e^6 times faster, by squares; each group by itself and all side by side."""
    monkeypatch.setattr(scoring_module, "_FEW", few)
    panel, _ = transplants(x=sd.datasets.heart_transplants().donor_age > 30)
    likelihood = PanelLikelihood(panel.gaps, 4)
    assert len(likelihood.covariates) == 2
    score = PanelScore(panel.gaps, likelihood.group, 2, 4, LINKS, [3])
    log_rates = torch.randn(2, 7, dtype=D, generator=torch.Generator().manual_seed(0)) - 1.0
    log_rates[:, [0, 2, 3, 5]] += fast  # not those of deaths, which nobody would survive
    leaf = log_rates.clone().requires_grad_()
    value = likelihood(generators(leaf)[:, None])[0]
    (slope,) = torch.autograd.grad(value, leaf)
    found = score(log_rates)
    assert found.value == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(found.slope, slope, rtol=1e-9, atol=1e-9 * float(slope.abs().max()))


@pytest.mark.parametrize("fast", [0.0, 6.0])
def test_many_draws_with_many_covariates_are_taken_one_by_one_or_at_once(fast: float) -> None:
    """Some fifty ages: draw by draw every transition has powers of its own, together every age has."""
    panel, _ = transplants(150, x=sd.datasets.heart_transplants().donor_age)
    likelihood = PanelLikelihood(panel.gaps, 4)
    ages = len(likelihood.covariates)
    assert ages > 20
    log_rates = torch.randn(ages * 20, 7, dtype=D, generator=torch.Generator().manual_seed(0)) - 1.0
    log_rates[:, [0, 2, 3, 5]] += fast
    q = generators(log_rates).unflatten(0, (ages, 20))
    together = likelihood(q)
    for k in (0, 7, 19):
        torch.testing.assert_close(likelihood(q[:, k : k + 1]), together[k : k + 1], rtol=1e-12, atol=0.0)


def test_the_information_is_the_mean_square_of_the_score() -> None:
    """Over everything that could have been seen, by the law itself: no term is left to chance."""
    start, dt = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0.3, 2.0, 0.3, 1.0, 1.0, 50.0], dtype=D)
    after = torch.tensor([0, 1, 1, 2, 1, 3])
    frame = {
        "id": np.repeat(np.arange(6), 2),
        "t": torch.stack([torch.zeros(6, dtype=D), dt], 1).reshape(-1).numpy(),
        "s": torch.stack([start, after], 1).reshape(-1).numpy(),
    }
    panel = PanelData(frame, "id", "t", "s", labels=range(4))
    log_rates = torch.linspace(-2.0, 1.0, 7, dtype=D)[None]
    group = torch.zeros(6, dtype=torch.long)
    found = PanelScore(panel.gaps, group, 1, 4, LINKS, [])(log_rates)
    expected = torch.zeros(7, 7, dtype=D)
    for i, t in zip(start.tolist(), dt, strict=True):
        leaf = log_rates.clone().requires_grad_()
        p = transition(generators(leaf)[0], t)[i]
        for j in range(4):
            (g,) = torch.autograd.grad(p[j].log(), leaf, retain_graph=True)
            expected += p[j].detach() * g[0][:, None] * g[0]
    torch.testing.assert_close(found.information[0], expected, rtol=1e-9, atol=1e-12)


def test_no_rate_can_be_moved_to_a_better_place() -> None:
    panel, mask = transplants()
    fit = fit_rates(panel, mask, prior=(-1.0, 1.5))
    leaf = fit.rates[LINKS[:, 0], LINKS[:, 1]].log()[None].requires_grad_()
    value = PanelLikelihood(panel.gaps, 4)(generators(leaf)[:, None])[0]
    (slope,) = torch.autograd.grad(value, leaf)
    # a score is known to some 1e-12 of the sum of its terms, which is the number of jumps
    assert float(slope.abs().max()) < 1e-8


def test_the_maximum_is_the_same_in_any_unit_of_time_and_order_of_states() -> None:
    panel, mask = transplants(60)
    known = fit_rates(panel, mask, num_draws=0)
    years = sd.datasets.heart_transplants().years
    for unit in (1e-12, 1e12):
        other, _ = transplants(60, years=years * unit)
        fit = fit_rates(other, mask, num_draws=0)
        # a rate whose likelihood grows towards zero stops at a bound
        torch.testing.assert_close(fit.rates * unit, known.rates, rtol=1e-10, atol=1e-11)
    order = [2, 0, 3, 1]
    turned, _ = transplants(60, labels=[panel.labels[k] for k in order])
    fit = fit_rates(turned, mask[order][:, order], num_draws=0)
    torch.testing.assert_close(fit.rates, known.rates[order][:, order], rtol=1e-10, atol=1e-11)


def test_covariates_may_be_in_any_unit_and_from_any_zero() -> None:
    """Hazard ratios are per unit; rates are those at zero of the covariate, wherever that is."""
    x = (sd.datasets.heart_transplants().donor_age > 30).double()
    panel, mask = transplants(200, x=x)
    known = fit_rates(panel, mask, prior=(-1.0, 1.0), num_draws=500)
    for unit, zero in ((1e6, 0.0), (1e-6, 0.0), (1.0, 7.0)):
        other, _ = transplants(200, x=unit * (x + zero))
        fit = fit_rates(other, mask, prior=(-1.0, 1.0), num_draws=500)
        assert fit.log_likelihood == pytest.approx(known.log_likelihood, rel=1e-11)
        effect = known.draws[:, 7:]
        torch.testing.assert_close(fit.draws[:, 7:] * unit, effect, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            fit.draws[:, :7], known.draws[:, :7] - zero * effect, rtol=1e-6, atol=1e-6 * (1 + zero)
        )


def test_the_maximum_alone_is_the_same_and_has_no_draws() -> None:
    panel, mask = transplants(60)
    alone, whole = fit_rates(panel, mask, num_draws=0), fit_rates(panel, mask, num_draws=2)
    assert torch.equal(alone.rates, whole.rates)
    assert alone.log_likelihood == whole.log_likelihood
    assert alone.draws.shape == (0, 7)
    assert alone.idata is None
    with pytest.raises(EmptyDataError, match="no draws"):
        alone.report()
    with pytest.raises(InvalidInputError, match="num_draws"):
        fit_rates(panel, mask, num_draws=1)


def test_a_state_of_exact_entry_is_not_left() -> None:
    panel, mask = transplants()
    with pytest.raises(InvalidInputError, match="lets a state of exact entry be left"):
        fit_rates(panel, mask | mask.T)
