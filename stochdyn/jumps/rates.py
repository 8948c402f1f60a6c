"""Rates of a panel: maximum likelihood, a posterior by importance sampling, and what the data can't tell."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from stochdyn._checks import as_seed, check_bool, check_positive_int, check_real, check_type
from stochdyn.diagnostics.container import from_draws
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError, ZeroProbabilityError
from stochdyn.jumps.panel import PanelData
from stochdyn.jumps.uniformisation import _transition

__all__ = ["RatePosterior", "fit_rates"]

#: Draws of weights with a worse k-hat are moved by Metropolis steps, so many of them; past the second bound that won't do.
_BAD, _MOVES, _HOPELESS = 0.7, 5, 1.0
#: Numbers of transition matrices that are held at once.
_CHUNK = 4_000_000
#: Degrees of freedom of the proposal.
_TAILS = 7.0


@dataclass(frozen=True)
class RatePosterior:
    """What a panel says of its rates.

    Attributes:
        rates: ``(S, S)`` the maximum of the likelihood, as a generator with its diagonal.
        log_likelihood: the log-likelihood there.
        labels: the labels of the states.
        links: ``(r, 2)`` the pairs (from, to) whose rates are free, in the order of the draws.
        draws: ``(num_draws, r + covariates)`` posterior draws: log rates, then log hazard ratios of the covariates.
        khat: the Pareto k of the importance weights behind the draws: they are good below 0.7.
        effective: the effective number of draws behind the resampling.
        moved: whether the weights were bad, so that the draws were moved by Metropolis steps on the exact density.
        idata: the same draws in ArviZ's container.
        observed_gaps: how often each link was seen directly between two visits.
        expected_jumps: the largest expected number of jumps in a typical gap.
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

    @property
    def rate_draws(self) -> Tensor:
        """Posterior draws of the generator at covariates of zero, ``(num_draws, S, S)``, with the diagonal."""
        size = len(self.labels)
        off = self.draws.new_zeros(len(self.draws), size, size)
        off[:, self.links[:, 0], self.links[:, 1]] = self.draws[:, : len(self.links)].exp()
        return off - torch.diag_embed(off.sum(-1))

    def report(self) -> str:
        """Return a table of the rates with intervals, and what the data hardly tell."""
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
        if self.expected_jumps > 1:
            lines.append(
                f"A typical gap holds up to {self.expected_jumps:.1f} jumps: fast rates are known by their ratios only."
            )
        return "\n".join(lines)


def fit_rates(
    panel: PanelData,
    mask: Any = None,
    prior: tuple[float, float] | None = None,
    reversible: bool = False,
    num_draws: int = 1000,
    seed: int = 0,
) -> RatePosterior:
    r"""Estimate the rates of a jump process from a panel of visits.

    The likelihood is exact: :math:`\prod P_{s_ks_{k+1}}(\Delta_k)`, and for exactly seen entries :math:`\sum_jP_{sj}(\Delta)Q_{jd}`.
    Its maximum is found in log rates; the posterior is a Student-t around the mode, corrected by importance weights and
    resampled.

    Args:
        panel: the visits.
        mask: ``(S, S)`` True where a jump is possible; all jumps if None, but out of states of exact entry.
        prior: mean and standard deviation of the log rates (and of log hazard ratios around zero); if None a wide one around the
            crude overall rate, with a standard deviation of 3.
        reversible: keep to detailed balance; needs a symmetric mask.
        num_draws: the number of posterior draws.
        seed: of all randomness.

    Raises:
        ZeroProbabilityError: if a transition was seen that the mask makes impossible.

    Warns:
        ApproximationWarning: if the importance weights are hopeless (k-hat above 1); between 0.7 and 1 the draws are moved by
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
    check_positive_int(num_draws, "num_draws", 2)
    source = torch.Generator().manual_seed(as_seed(seed))
    problem = _Problem(panel, mask, prior, reversible)
    best = problem.maximise(problem.start(), with_prior=False)
    likelihood = float(problem.log_likelihood(best[None])[0])
    mode = problem.maximise(best, with_prior=True)
    draws, khat, effective, moved = problem.posterior(mode, num_draws, source)
    if khat > _HOPELESS:
        warnings.warn(
            f"The importance weights of the rates are poor (k-hat {khat:.2f}): intervals may be wrong. Give a prior, "
            "or leave out links that the data don't show (mask).",
            ApproximationWarning,
            stacklevel=2,
        )
    off = problem.matrices(best[None])[0]
    log_rates = problem.log_rates(draws)
    named = torch.cat([log_rates, draws[:, problem.num_base :]], -1)
    idata = from_draws(
        {
            "log_rate": log_rates.numpy()[None],
            **(
                {"log_hazard_ratio": draws[:, problem.num_base :].numpy()[None]}
                if panel.covariate_names
                else {}
            ),
        },
        coords={
            "link": [f"{panel.labels[i]}->{panel.labels[j]}" for i, j in problem.links.tolist()],
            **({"covariate": problem.effect_names} if panel.covariate_names else {}),
        },
        dims={"log_rate": ["link"], **({"log_hazard_ratio": ["covariate"]} if panel.covariate_names else {})},
    )
    seen = panel.counts()[problem.links[:, 0], problem.links[:, 1]]
    typical = float(panel.gaps.dt.median()) * float((-off.diagonal()).max())
    return RatePosterior(
        off, likelihood, panel.labels, problem.links, named, khat, effective, moved, idata, seen, typical
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
            given = torch.as_tensor(np.asarray(mask))
            if given.shape != (size, size):
                raise ShapeError(
                    "mask must hold True or False for every pair of states", got=tuple(given.shape)
                )
            allowed = allowed & given.bool()
        if not bool(allowed.any()):
            raise InvalidInputError("the mask allows no jump")
        if reversible and not torch.equal(allowed, allowed.mT):
            raise InvalidInputError(
                "detailed balance needs a symmetric mask", hint="a jump and its reverse go together"
            )
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
        # equal gaps under equal covariates share a matrix, and equal transitions a logarithm
        g = panel.gaps
        keys = torch.cat([g.dt[:, None], g.covariates], -1)
        unique, place = keys.unique(dim=0, return_inverse=True)
        self.dt, self.x = unique[:, 0], unique[:, 1:]
        cell = ((place * size + g.before) * size + g.after) * 2 + g.entered.long()
        cells, count = cell.unique(return_counts=True)
        self.entered = (cells % 2).bool()
        rest = cells // 2
        self.after, rest = rest % size, rest // size
        self.before, self.gap = rest % size, rest // size
        self.count = count.double()

    def start(self) -> Tensor:
        """Return where the search begins: the crude rates."""
        if not self.reversible:
            return torch.cat([self._crude, torch.zeros(self.num_parameters - self.num_base).double()])
        return torch.cat(
            [
                self._crude.mean().expand(len(self.pairs)),
                torch.zeros(self.num_parameters - len(self.pairs)).double(),
            ]
        )

    def log_rates(self, theta: Tensor) -> Tensor:
        """Return log rates ``(B, r)`` of the links at covariates of zero."""
        if not self.reversible:
            return theta[:, : self.num_base]
        symmetric = theta[:, : len(self.pairs)]
        log_pi = torch.cat([torch.zeros_like(theta[:, :1]), theta[:, len(self.pairs) : self.num_base]], -1)
        index = {tuple(p): k for k, p in enumerate(self.pairs.tolist())}
        which = [index[min(i, j), max(i, j)] for i, j in self.links.tolist()]
        return symmetric[:, which] + 0.5 * (log_pi[:, self.links[:, 1]] - log_pi[:, self.links[:, 0]])

    def matrices(self, theta: Tensor) -> Tensor:
        """Return generators ``(B, S, S)`` at covariates of zero."""
        return self._generator(self.log_rates(theta))

    def _generator(self, log_rates: Tensor) -> Tensor:
        size = self.panel.num_states
        off = log_rates.new_zeros(*log_rates.shape[:-1], size, size)
        off[..., self.links[:, 0], self.links[:, 1]] = log_rates.exp()
        return off - torch.diag_embed(off.sum(-1))

    def log_likelihood(self, theta: Tensor) -> Tensor:
        """Return log-likelihoods ``(B,)`` of parameters ``(B, p)``."""
        size = self.panel.num_states
        step = max(1, _CHUNK // (len(self.dt) * size**2))
        return torch.cat([self._chunk(part) for part in theta.split(step)])

    def _chunk(self, theta: Tensor) -> Tensor:
        base = self.log_rates(theta)
        if self.num_covariates:
            effect = theta[:, self.num_base :].reshape(-1, self.num_covariates, len(self.links))
            # equal covariates share their generators
            values, place = self.x.unique(dim=0, return_inverse=True)
            q = self._generator(base[None] + torch.einsum("gc,bcr->gbr", values, effect))
            p = q.new_empty(len(self.dt), *q.shape[1:])
            parts = [(place == k).nonzero()[:, 0] for k in range(len(values))]
            made = torch.cat([_transition(a, self.dt[part]) for a, part in zip(q, parts, strict=True)])
            p = made[torch.cat(parts).argsort()]
            q = q[place]
        else:
            q = self._generator(base)[None]
            p = _transition(q[0], self.dt)
        prob = p[self.gap, :, self.before, self.after]
        if bool(self.entered.any()):
            off = q - torch.diag_embed(q.diagonal(dim1=-2, dim2=-1))
            gap, after = self.gap[self.entered], self.after[self.entered]
            into = p[gap, :, self.before[self.entered]]
            rate = off[gap if len(off) > 1 else torch.zeros_like(gap), :, :, after]
            prob = prob.index_put((self.entered.nonzero()[:, 0],), (into * rate).sum(-1))
        return self.count @ prob.log()

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the log prior ``(B,)`` up to a constant."""
        base = ((self.log_rates(theta) - self.centre) / self.width) ** 2
        return -0.5 * (base.sum(-1) + (theta[:, self.num_base :] / self.width).square().sum(-1))

    def maximise(self, start: Tensor, with_prior: bool) -> Tensor:
        """Return the maximum by L-BFGS, from a start."""
        total = float(self.count.sum())

        def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
            theta = torch.tensor(flat).requires_grad_()
            value = self.log_likelihood(theta[None])[0]
            if with_prior:
                value = value + self.log_prior(theta[None])[0]
            if not bool(torch.isfinite(value)):
                return 1e25, np.zeros_like(flat)
            slope = torch.autograd.grad(value, theta)[0]
            # per transition, so that the first step is of order one
            return -float(value.detach()) / total, -slope.numpy() / total

        if not bool(torch.isfinite(self.log_likelihood(start[None])).all()):
            with torch.no_grad():
                reach = _transition(self.matrices(start[None])[0], self.dt[:1])[0]
            bad = (reach[self.before, self.after] <= 0) & ~self.entered
            k = int(bad.nonzero()[0, 0]) if bool(bad.any()) else 0
            labels = self.panel.labels
            raise ZeroProbabilityError(
                "a transition was seen that the mask makes impossible",
                got=f"from {labels[int(self.before[k])]!r} to {labels[int(self.after[k])]!r}",
            )
        bounds = [(v - 12.0, v + 12.0) for v in start.tolist()]
        found = minimize(
            cost,
            start.numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9},
        )
        return torch.as_tensor(found.x)

    def _curvature(self, mode: Tensor) -> Tensor:
        """Return minus the Hessian of the log posterior, by central differences of gradients."""
        step, rows = 1e-4, []
        for k in range(len(mode)):
            slopes = []
            for sign in (1.0, -1.0):
                theta = mode.clone()
                theta[k] += sign * step
                theta.requires_grad_()
                value = (self.log_likelihood(theta[None]) + self.log_prior(theta[None]))[0]
                slopes.append(torch.autograd.grad(value, theta)[0])
            rows.append(-(slopes[0] - slopes[1]) / (2 * step))
        hessian = torch.stack(rows)
        return 0.5 * (hessian + hessian.mT)

    def _skew(self, mode: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales ``(p,)`` below and above the mode along the axes of the curvature, so that no side is too narrow.

        Reference:
            Geweke, "Bayesian inference in econometric models using Monte Carlo integration", 1989, section 5.
        """
        steps = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        peak = (self.log_likelihood(mode[None]) + self.log_prior(mode[None]))[0]
        sides = []
        for sign in (-1.0, 1.0):
            theta = mode + sign * steps[:, None, None] * spread.mT
            value = self.log_likelihood(theta.reshape(-1, len(mode))) + self.log_prior(
                theta.reshape(-1, len(mode))
            )
            drop = (peak - value).reshape(len(steps), -1).clamp(min=1e-3)
            sides.append((steps[:, None] / (2.0 * drop).sqrt()).amax(0).clamp(1.0, 5.0))
        return sides[0], sides[1]

    def posterior(
        self, mode: Tensor, num_draws: int, source: torch.Generator
    ) -> tuple[Tensor, float, float, bool]:
        """Return draws, the k-hat of their weights, their effective number, and whether they had to be moved."""
        values, vectors = torch.linalg.eigh(self._curvature(mode))
        spread = vectors / values.clamp(min=1.0 / (4 * self.width) ** 2).sqrt()
        p = len(mode)
        many = 2 * num_draws
        normal = torch.randn(many, p, dtype=torch.float64, generator=source)
        gamma = torch.distributions.Gamma(_TAILS / 2, _TAILS / 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=source)))
            scale = gamma.sample((many,)).double()
        z = normal / scale.sqrt()[:, None]
        with torch.no_grad():
            below, above = self._skew(mode, spread)
            stretched = torch.where(z < 0, z * below, z * above)
            theta = mode + stretched @ spread.mT
            width = torch.where(z < 0, below, above)
            log_proposal = -0.5 * (_TAILS + p) * torch.log1p(z.square().sum(-1) / _TAILS) - width.log().sum(
                -1
            )
            log_target = self.log_likelihood(theta) + self.log_prior(theta)
        smoothed = pareto_smooth(log_target - log_proposal)
        weights = (smoothed.log_weights - smoothed.log_weights.logsumexp(0)).exp()
        chosen = torch.multinomial(weights, num_draws, replacement=True, generator=source)
        khat, effective = float(smoothed.khat), float(1.0 / weights.square().sum())
        moved = khat > _BAD
        draws = theta[chosen]
        if moved:  # the weights miss a tail: let the draws walk a little under the exact density
            draws = self._walk(draws, log_target[chosen], spread, source)
        return draws, khat, effective, moved

    def _walk(self, theta: Tensor, value: Tensor, spread: Tensor, source: torch.Generator) -> Tensor:
        """Move draws by Metropolis steps along the axes of the curvature."""
        scale = 2.38 / math.sqrt(theta.shape[1])
        for _ in range(_MOVES):
            step = torch.randn(theta.shape, dtype=torch.float64, generator=source) @ spread.mT
            proposed = theta + scale * step
            with torch.no_grad():
                other = self.log_likelihood(proposed) + self.log_prior(proposed)
            accept = torch.rand(len(theta), dtype=torch.float64, generator=source).log() < other - value
            theta, value = torch.where(accept[:, None], proposed, theta), torch.where(accept, other, value)
        return theta
