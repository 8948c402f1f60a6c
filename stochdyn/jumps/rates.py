"""Rates of a panel: maximum likelihood, a posterior by importance sampling, and what the data can't tell."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_mask, as_seed, check_bool, check_positive_int, check_real, check_type
from stochdyn._transforms import recorded
from stochdyn.diagnostics.container import from_draws
from stochdyn.errors import (
    ApproximationWarning,
    EmptyDataError,
    InvalidInputError,
    ShapeError,
    ZeroProbabilityError,
)
from stochdyn.jumps.amortised import AmortisedRates
from stochdyn.jumps.embedding import other_generators
from stochdyn.jumps.likelihood import PanelLikelihood
from stochdyn.jumps.panel import PanelData
from stochdyn.jumps.proposal import draw_posterior
from stochdyn.jumps.scoring import PanelScore, Scored, climb

__all__ = ["RatePosterior", "fit_rates"]

#: Past this k-hat Metropolis steps don't help either.
_HOPELESS = 1.0
#: Log rates move by at most so much from where the search began.
_REACH = 12.0
#: Weighted draws behind the posterior, at least.
_FEWEST = 2000


@dataclass(frozen=True)
class RatePosterior:
    """What a panel says of its rates.

    Attributes:
        rates: The maximum of the likelihood, as a generator ``(S, S)`` with its diagonal.
        log_likelihood: The log-likelihood there.
        labels: The labels of the states.
        links: The pairs (from, to) whose rates are free, in the order of the draws, ``(r, 2)``.
        draws: Posterior draws ``(num_draws, r + covariates)``: log rates, then log hazard ratios of the covariates.
        khat: The Pareto k of the importance weights behind the draws: they are good below 0.7; NaN without draws.
        effective: The effective number of draws behind the resampling.
        moved: Whether the weights were bad, so that the draws were moved by Metropolis steps on the exact density.
        idata: The same draws in ArviZ's container; None without draws.
        observed_gaps: How often each link was seen directly between two visits.
        expected_jumps: The largest expected number of jumps in a typical gap.
        notes: What the data can't tell, in sentences.
    """

    rates: Tensor
    log_likelihood: float
    labels: list[Any]
    links: Tensor
    draws: Tensor
    khat: float
    effective: float
    moved: bool
    idata: Any
    observed_gaps: Tensor
    expected_jumps: float
    notes: list[str]

    @property
    def rate_draws(self) -> Tensor:
        """Posterior draws of the generator at covariates of zero, ``(num_draws, S, S)``, with the diagonal."""
        size = len(self.labels)
        off = self.draws.new_zeros(len(self.draws), size, size)
        off[:, self.links[:, 0], self.links[:, 1]] = self.draws[:, : len(self.links)].exp()
        return off - torch.diag_embed(off.sum(-1))

    def report(self) -> str:
        """Return a table of the rates with intervals, and what the data hardly tell.

        Raises:
            EmptyDataError: If the fit has no draws.
        """
        if not len(self.draws):
            raise EmptyDataError("there are no draws to report on", hint="fit_rates with num_draws above 0")
        low, middle, high = (
            self.draws[:, : len(self.links)].exp().quantile(self.draws.new_tensor([0.025, 0.5, 0.975]), 0)
        )
        lines = [f"{'from':>12} {'to':>12} {'rate':>10} {'2.5 %':>10} {'97.5 %':>10}"]
        for k, (i, j) in enumerate(self.links.tolist()):
            note = "" if self.observed_gaps[k] else "   never seen between two visits: an upper limit at best"
            lines.append(
                f"{self.labels[i]!s:>12} {self.labels[j]!s:>12} {float(middle[k]):10.4g} {float(low[k]):10.4g} {float(high[k]):10.4g}{note}"
            )
        moved = ", moved by Metropolis steps" if self.moved else ""
        lines.append(
            f"log-likelihood {self.log_likelihood:.4f}, k-hat {self.khat:.2f}, {self.effective:.0f} effective draws{moved}"
        )
        return "\n".join([*lines, *self.notes])


def fit_rates(
    panel: PanelData,
    mask: Any = None,
    prior: tuple[float, float] | None = None,
    reversible: bool = False,
    num_draws: int = 1000,
    seed: int = 0,
    start: AmortisedRates | None = None,
) -> RatePosterior:
    r"""Estimate the rates of a jump process from a panel of visits.

    The likelihood is exact: :math:`\prod P_{s_ks_{k+1}}(\Delta_k)`, and for exactly seen entries :math:`\sum_jP_{sj}(\Delta)Q_{jd}`.
    Its maximum is found by Fisher scoring in log rates; the posterior is a Student-t around the mode, corrected by importance weights and
    resampled.

    Args:
        panel: The visits.
        mask: True where a jump is possible, ``(S, S)``; all jumps if None, but out of states of exact entry.
        prior: The mean and the standard deviation of the log rates at the mean of the covariates; log hazard ratios per standard
            deviation of a covariate have the same standard deviation around zero. If None a wide one around the crude overall rate, with a
            standard deviation of 3.
        reversible: Whether detailed balance holds; it needs a symmetric mask.
        num_draws: The number of posterior draws; none, and the maximum alone in a fraction of the time, if 0.
        seed: The seed of all randomness.
        start: A network whose rates are where the search begins; observed jumps over observed time if None. It helps where
            many jumps fall into a gap.

    Raises:
        ZeroProbabilityError: If a transition was seen that the mask makes impossible.

    Warns:
        ApproximationWarning: If the importance weights are hopeless (k-hat above 1); between 0.7 and 1 the draws are moved by
            Metropolis steps on the exact density, and the result says so.

    Example:
        >>> data = {"id": [1, 1, 1, 1, 2, 2, 2], "t": [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0], "s": [0, 1, 0, 0, 1, 0, 1]}
        >>> fit = fit_rates(PanelData(data, "id", "t", "s"))
        >>> fit.rates.shape, fit.draws.shape
        (torch.Size([2, 2]), torch.Size([1000, 2]))

    Reference:
        Kalbfleisch and Lawless, "The analysis of panel data under a Markov assumption", 1985.
    """
    check_type(panel, PanelData, "panel")
    check_bool(reversible, "reversible")
    check_positive_int(num_draws, "num_draws", 2 if num_draws else 0)
    if start is not None:
        check_type(start, AmortisedRates, "start")
    source = torch.Generator().manual_seed(as_seed(seed))
    problem = _Problem(panel, mask, prior, reversible)
    mode = problem.maximise(problem.start(start), with_prior=True)
    # from the mode: where a rate's likelihood has no maximum, the search from there ends at a bound and doesn't wander
    best = problem.maximise(mode, with_prior=False)
    likelihood = float(problem.log_likelihood(best[None])[0])
    draws, khat, effective, moved = mode.new_zeros(0, len(mode)), math.nan, 0.0, False
    if num_draws:
        draws, khat, effective, _, moved = draw_posterior(
            problem.log_density, mode, problem.curvature(mode), max(num_draws, _FEWEST), source
        )
        draws = draws[:num_draws]  # resampled in random order
    if khat > _HOPELESS:
        warnings.warn(
            f"The importance weights of the rates are poor (k-hat {khat:.2f}): intervals may be wrong. Give a prior, "
            "or leave out links that the data don't show (mask).",
            ApproximationWarning,
            stacklevel=2,
        )
    named = problem.named(draws)
    off = problem.generator(problem.named(best[None])[:, : len(problem.links)])[0]
    idata = _container(panel, problem, named) if num_draws else None
    seen = panel.counts()[problem.links[:, 0], problem.links[:, 1]]
    typical = float(panel.gaps.dt.median()) * float((-off.diagonal()).max())
    return RatePosterior(
        off,
        likelihood,
        panel.labels,
        problem.links,
        named,
        khat,
        effective,
        moved,
        idata,
        seen,
        typical,
        _not_known(panel, off, typical),
    )


def _container(panel: PanelData, problem: _Problem, named: Tensor) -> Any:
    """Return draws in ArviZ's container."""
    draws, coords, dims = (
        {"log_rate": named[None, :, : len(problem.links)].numpy()},
        {"link": [f"{panel.labels[i]}->{panel.labels[j]}" for i, j in problem.links.tolist()]},
        {"log_rate": ["link"]},
    )
    if panel.covariate_names:
        draws["log_hazard_ratio"] = named[None, :, len(problem.links) :].numpy()
        coords["covariate"], dims["log_hazard_ratio"] = problem.effect_names, ["covariate"]
    return from_draws(draws, coords=coords, dims=dims)


def _not_known(panel: PanelData, rates: Tensor, expected_jumps: float) -> list[str]:
    """Say what the panel can't tell of rates."""
    notes = []
    if expected_jumps > 1:
        # information on a rate of two alike states, relative to whole paths: 4 x / (e^{4 x} - 1)
        kept = 4 * expected_jumps / math.expm1(min(4 * expected_jumps, 700.0))
        notes.append(
            f"A typical gap holds up to {expected_jumps:.1f} jumps, so some {100 * kept:.2g} % of the information of whole paths is "
            "left: fast rates are known by their ratios only."
        )
    dt = panel.gaps.dt
    if float(dt.max() - dt.min()) <= 1e-9 * float(dt.max()):
        interval = float(dt.median())
        others = other_generators(rates, interval)
        if others:
            notes.append(
                f"All gaps are {interval:g}, and {len(others)} other generators have the same transition probabilities: the data "
                "can't tell them apart. Visits at a second interval would."
            )
        counts = panel.counts()
        if bool((counts.sum(-1) > 0).all()):
            share = counts / counts.sum(-1, keepdim=True)
            if float(torch.linalg.det(share)) <= 0:
                notes.append(
                    "The shares of transitions have a determinant that isn't positive, which no jump process has: the rates are a "
                    "best fit, and a jump process may be the wrong model or the interval too long."
                )
    absent = [
        panel.labels[k]
        for k in range(panel.num_states)
        if not bool(((panel.gaps.before == k) | (panel.gaps.after == k)).any())
    ]
    if absent:
        notes.append(f"States without data: {absent}. Their rates are those of the prior.")
    return notes


def _middle_and_spread(covariates: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of covariates ``(n, c)``, one where they don't vary."""
    middle = covariates.mean(0)
    spread = (covariates - middle).square().mean(0).sqrt()
    return middle, torch.where(covariates.amax(0) > covariates.amin(0), spread, torch.ones_like(spread))


def _check_possible(panel: PanelData, allowed: Tensor) -> None:
    """Refuse visits that no chain of allowed jumps connects, naming the first."""
    gaps, reach = panel.gaps, torch.eye(panel.num_states, dtype=torch.bool)
    for _ in range(panel.num_states):
        reach = reach | (reach[:, :, None] & allowed).any(1)
    # an entry that is seen exactly ends with a jump into the state
    entered = (reach[:, :, None] & allowed).any(1)
    possible = torch.where(gaps.entered, entered[gaps.before, gaps.after], reach[gaps.before, gaps.after])
    if not bool(possible.all()):
        k = int((~possible).nonzero()[0])
        subject, before, after = panel.visits_of(k)
        raise ZeroProbabilityError(
            "a transition was seen that the mask makes impossible",
            got=f"subject {subject!r} from {panel.labels[int(gaps.before[k])]!r} at {before:g} "
            f"to {panel.labels[int(gaps.after[k])]!r} at {after:g}",
            hint="is a jump missing from the mask, or a label wrong?",
        )


class _Problem:
    """The likelihood of a panel as a function of log rates."""

    def __init__(
        self, panel: PanelData, mask: Any, prior: tuple[float, float] | None, reversible: bool
    ) -> None:
        self.panel, self.reversible, size = panel, reversible, panel.num_states
        allowed = ~torch.eye(size, dtype=torch.bool)
        if mask is None:
            allowed[panel.exact_entry] = False
        else:
            given = as_mask(mask)
            if given.shape != (size, size):
                raise ShapeError(
                    "mask must hold True or False for every pair of states", got=tuple(given.shape)
                )
            allowed = allowed & given
            if bool(allowed[panel.exact_entry].any()):
                raise InvalidInputError(
                    "the mask lets a state of exact entry be left again",
                    got=[panel.labels[k] for k in panel.exact_entry if bool(allowed[k].any())],
                )
        if not bool(allowed.any()):
            raise InvalidInputError("the mask allows no jump")
        if reversible and not torch.equal(allowed, allowed.mT):
            raise InvalidInputError(
                "detailed balance needs a symmetric mask", hint="a jump and its reverse go together"
            )
        _check_possible(panel, allowed)
        self.links = allowed.nonzero()
        self.num_covariates = len(panel.covariate_names)
        if reversible:
            self.pairs = allowed.triu().nonzero()
            self.num_base = len(self.pairs) + size - 1
        else:
            self.num_base = len(self.links)
        self.num_parameters = self.num_base + self.num_covariates * len(self.links)
        self.effect_names = [
            f"{c}: {panel.labels[i]}->{panel.labels[j]}"
            for c in panel.covariate_names
            for i, j in self.links.tolist()
        ]
        crude = panel.crude_rates()
        overall = float(crude.sum() / max(1, int((crude > 0).sum()))) or 1.0 / float(panel.gaps.dt.median())
        if prior is None:
            self.centre, self.width = math.log(overall), 3.0
        else:
            if not isinstance(prior, tuple | list) or len(prior) != 2:
                raise InvalidInputError(
                    "prior must be the mean and the standard deviation of log rates", got=repr(prior)[:60]
                )
            check_real(prior[0], "prior[0]")
            check_real(prior[1], "prior[1]", above=0.0)
            self.centre, self.width = float(prior[0]), float(prior[1])
        self._crude = crude[self.links[:, 0], self.links[:, 1]].clamp(min=0.1 * overall).log()
        self.likelihood = PanelLikelihood(panel.gaps, size)
        # covariates are counted from their mean, in standard deviations: neither zero nor one of them need lie in the data
        self.middle, self.spread = _middle_and_spread(panel.gaps.covariates)
        self.covariates = (self.likelihood.covariates - self.middle) / self.spread
        self.score = PanelScore(
            panel.gaps, self.likelihood.group, len(self.covariates), size, self.links, panel.exact_entry
        )
        # how log rates at the mean of the covariates change with the parameters, and what the prior adds to minus the Hessian
        self.map = self.log_rates(torch.eye(self.num_base, self.num_parameters, dtype=torch.float64)).mT
        effects = torch.eye(self.num_parameters - self.num_base, dtype=torch.float64)
        self.precision = torch.block_diag(self.map.mT @ self.map, effects) / self.width**2

    def start(self, network: AmortisedRates | None) -> Tensor:
        """Return where the search begins: the crude rates, or those of a network."""
        crude = self._crude
        if network is not None:
            crude = network.posterior(self.panel).log_mean[self.links[:, 0], self.links[:, 1]]
        if not self.reversible:
            return torch.cat([crude, torch.zeros(self.num_parameters - self.num_base).double()])
        return torch.cat(
            [
                crude.mean().expand(len(self.pairs)),
                torch.zeros(self.num_parameters - len(self.pairs)).double(),
            ]
        )

    def log_rates(self, theta: Tensor) -> Tensor:
        """Return log rates ``(B, r)`` of the links at the mean of the covariates."""
        if not self.reversible:
            return theta[:, : self.num_base]
        symmetric = theta[:, : len(self.pairs)]
        log_pi = torch.cat([torch.zeros_like(theta[:, :1]), theta[:, len(self.pairs) : self.num_base]], -1)
        index = {tuple(p): k for k, p in enumerate(self.pairs.tolist())}
        which = [index[min(i, j), max(i, j)] for i, j in self.links.tolist()]
        return symmetric[:, which] + 0.5 * (log_pi[:, self.links[:, 1]] - log_pi[:, self.links[:, 0]])

    def named(self, theta: Tensor) -> Tensor:
        """Return log rates at covariates of zero and log hazard ratios per unit of the covariates, ``(B, r + c r)``."""
        base = self.log_rates(theta)
        effect = theta[:, self.num_base :].reshape(len(theta), self.num_covariates, len(self.links))
        effect = effect / self.spread[:, None]
        return torch.cat([base - (self.middle[:, None] * effect).sum(1), effect.flatten(1)], 1)

    def generator(self, log_rates: Tensor) -> Tensor:
        size = self.panel.num_states
        off = log_rates.new_zeros(*log_rates.shape[:-1], size, size)
        off[..., self.links[:, 0], self.links[:, 1]] = log_rates.exp()
        return off - torch.diag_embed(off.sum(-1))

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return log-likelihoods ``(B,)`` of parameters ``(B, p)``."""
        return self.likelihood(self.generator(self._by_group(theta)))

    def _by_group(self, theta: Tensor) -> Tensor:
        """Return log rates ``(G, B, r)`` of the links for each distinct row of covariates."""
        base = self.log_rates(theta)[None]
        if not self.num_covariates:
            return base
        effect = theta[:, self.num_base :].reshape(-1, self.num_covariates, len(self.links))
        return base + torch.einsum("gc,bcr->gbr", self.covariates, effect)

    def log_density(self, theta: Tensor) -> Tensor:
        """Return the log posterior ``(B,)`` up to a constant."""
        return self.log_likelihood(theta) + self.log_prior(theta)

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior ``(B,)`` up to a constant."""
        base = ((self.log_rates(theta) - self.centre) / self.width) ** 2
        return -0.5 * (base.sum(-1) + (theta[:, self.num_base :] / self.width).square().sum(-1))

    def scored(self, theta: Tensor, with_prior: bool) -> Scored:
        """Return log-likelihood or log posterior, score and information at parameters ``(p,)``."""
        value, slope, information = self.score(self._by_group(theta[None])[:, 0])
        # parameters move the log rates of group g by A + x_g for their effects, with A = map and x_g the covariates
        x = torch.cat([torch.ones(len(self.covariates), 1).double(), self.covariates], 1)
        size = x.shape[1]
        inner = (x[:, :, None] * x[:, None]).flatten(1).mT @ information.flatten(1)
        inner = inner.reshape(size, size, len(self.links), len(self.links))
        maps = [self.map] + [torch.eye(len(self.links), dtype=torch.float64)] * self.num_covariates
        gradient = torch.cat([maps[c].mT @ (x[:, c] @ slope) for c in range(size)])
        matrix = torch.cat(
            [torch.cat([maps[c].mT @ inner[c, d] @ maps[d] for d in range(size)], 1) for c in range(size)]
        )
        if with_prior:
            move = self.map @ theta[: self.num_base] - self.centre
            value += float(self.log_prior(theta[None])[0])
            gradient = gradient - torch.cat([self.map.mT @ move, theta[self.num_base :]]) / self.width**2
            matrix = matrix + self.precision
        return Scored(value, gradient, matrix)

    def maximise(self, start: Tensor, with_prior: bool) -> Tensor:
        """Return the maximum by Fisher scoring, from a start."""
        eye = torch.eye(len(self.links), dtype=torch.float64)
        effects = [x * eye for x in self.covariates.abs().amax(0)]
        less = torch.zeros_like(self.precision) if with_prior else self.precision
        return climb(
            lambda theta: self.scored(theta, with_prior),
            lambda theta: self.curvature(theta) - less,
            start,
            torch.cat([self.map, *effects], 1),
            _REACH,
        )

    @recorded
    def curvature(self, mode: Tensor) -> Tensor:
        """Return minus the Hessian of the log posterior, by central differences of its gradient, all in one call."""
        step = 1e-4
        moves = step * torch.eye(len(mode), dtype=torch.float64)
        theta = torch.cat([mode + moves, mode - moves]).requires_grad_()
        slopes = torch.autograd.grad(self.log_density(theta).sum(), theta)[0]
        hessian = -(slopes[: len(mode)] - slopes[len(mode) :]) / (2 * step)
        return 0.5 * (hessian + hessian.mT)
