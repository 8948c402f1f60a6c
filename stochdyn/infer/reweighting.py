"""From a guide to draws of the posterior: proposals that learn from their importance weights, and draws taken by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from stochdyn._transforms import recording
from stochdyn.core.particles.resampling import effective_size, systematic
from stochdyn.diagnostics.draws import PosteriorDraws, draw_posterior
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.infer.hierarchical import AutoHierarchicalNormal

__all__ = ["WeightedDraws", "draw_weighted", "learn_from_weights"]

# Below this k-hat the weights have a finite variance, and there is nothing left to mend.
_GOOD = 0.5
_UPDATES = 40
_LR = 0.02


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of the posterior that were taken from a guide's by their weights.

    Attributes:
        values: The draws ``(S, *shape)`` of the latent sites by name.
        khat: The shape of the tail of the weights; NaN where the guide has no density.
        ess: The number of independent draws that the weighted ones are worth.
        log_evidence: The importance estimate of the log evidence.
    """

    values: dict[str, Tensor]
    khat: float
    ess: float
    log_evidence: float


def learn_from_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    law: AutoHierarchicalNormal,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num_draws: int = 600,
    rounds: int = 3,
) -> None:
    r"""Fit the law of the parameters to its own draws, weighted towards the posterior, until the weights behave.

    .. math:: \max_q\ \sum_s w_s\log q(u_s),\qquad w_s\propto p(y,u_s)/q_{\text{old}}(u_s).

    A variational fit makes q too narrow rather than too wide, since it averages over q. This step averages over the posterior,
    which punishes what q leaves out, so tails and funnels that the fit cut off come back.

    Args:
        model: The Pyro model.
        guide: The guide, in which ``law`` stands, or which it is.
        law: The law of the parameters.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
        num_draws: The number of draws of each round.
        rounds: The largest number of rounds.

    Reference:
        O. Cappé, R. Douc, A. Guillin, J.-M. Marin and C. P. Robert, Adaptive importance sampling in general mixture classes,
        2008.
    """
    best, kept = math.inf, None
    for number in range(rounds + 1):
        draws = draw_posterior(model, guide, args, kwargs, num_draws=num_draws, seed=None)
        usable = _usable(draws.log_weights)
        smooth = pareto_smooth(usable)
        khat = float(smooth.khat)
        if khat < best:
            best, kept = khat, {n: v.clone() for n, v in law.state_dict().items()}
        if khat < _GOOD or number == rounds:
            break
        u = _latent(law, draws)
        weights = torch.softmax(smooth.log_weights, -1).to(u)
        parameters = [p for p in law.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters, lr=_LR)
        with recording():
            for _ in range(_UPDATES):
                optimiser.zero_grad()
                loss = -(weights * law.get_posterior().log_prob(u)).sum()
                loss.backward()
                optimiser.step()
    if kept is not None:
        law.load_state_dict(kept)


def draw_weighted(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_draws: int,
    proposals: int,
) -> WeightedDraws:
    """Draw from a guide and take draws by their smoothed importance weights, which makes them the posterior's.

    Args:
        model: The Pyro model.
        guide: The guide.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
        num_draws: The number of draws that are taken.
        proposals: The number of draws of the guide that they are taken from.

    Reference:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao and J. Gabry, Pareto smoothed importance sampling, 2024; systematic
        resampling.
    """
    draws = draw_posterior(model, guide, args, kwargs, num_draws=proposals, seed=None)
    latent = {n: v for n, v in draws.values.items() if draws.sites[n].kind == "latent"}
    raw = draws.log_weights
    if bool(torch.isnan(raw).all()):
        # A guide without a density: its draws as they are.
        return WeightedDraws({n: v[:num_draws] for n, v in latent.items()}, math.nan, math.nan, math.nan)
    usable = _usable(raw)
    smooth = pareto_smooth(usable)
    log_weights = smooth.log_weights.double()
    evidence = float(torch.logsumexp(log_weights, -1)) - math.log(proposals)
    index = systematic(log_weights.cpu(), num_draws)[torch.randperm(num_draws)]
    taken = {n: v[index.to(v.device)] for n, v in latent.items()}
    return WeightedDraws(taken, float(smooth.khat), float(effective_size(log_weights)), evidence)


def _usable(log_weights: Tensor) -> Tensor:
    """Return log weights in which a draw whose density isn't a number has no weight."""
    return torch.where(torch.isnan(log_weights), torch.full_like(log_weights, -math.inf), log_weights)


def _latent(law: AutoHierarchicalNormal, draws: PosteriorDraws) -> Tensor:
    """Return the draws ``(S, D)`` on the unconstrained scale, in the order of the guide."""
    parts = []
    trace: Any = law.prototype_trace
    for name, site in trace.iter_stochastic_nodes():
        value = draws.values[name]
        parts.append(biject_to(site["fn"].support).inv(value).reshape(value.shape[0], -1))
    return torch.cat(parts, -1)
