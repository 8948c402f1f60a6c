"""A Laplace start for the sites beside a path: the mode and curvature of the bound with the path integrated out."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor
from torch.distributions import biject_to

from stochdyn._checks import check_positive_int
from stochdyn._lending import lent
from stochdyn._transforms import recorded
from stochdyn.errors import InvalidInputError, NonFiniteError
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.hierarchical import AutoHierarchicalNormal
from stochdyn.infer.skewed import AutoSkewedNormal

__all__ = ["start_at_mode"]

_LATENT = "_{}_latent"
#: How many of the prior draws with the greatest bounds a search begins at.
_CLIMBS = 3


@recorded
def start_at_mode(
    guide: AutoPathGuide | AutoHierarchicalNormal,
    *args: Any,
    max_iterations: int = 30,
    num_starts: int = 0,
    **kwargs: Any,
) -> Tensor:
    r"""Put the law of the sites beside a path to the Laplace approximation of their posterior.

    With recomputed feedback the log weight of a draw estimates the evidence given the other sites,

    .. math:: f(u)=\log p(y,x,\theta(u))+\log|\theta'(u)|-\log q(x\mid\theta(u)),\qquad x\sim q(\cdot\mid\theta(u)),

    without any noise if the path is linear and Gaussian given them, and with the same random numbers at every u
    otherwise. Its mode (by L-BFGS) and the inverse of minus its second derivative (by differences of gradients)
    become location and covariance of the guide's normal law, from which few steps of stochastic optimisation
    remain.

    Args:
        guide: An :class:`AutoHierarchicalNormal` of a model without paths, or an :class:`AutoPathGuide` with
            ``feedback="recomputed"`` and ``rest=AutoMultivariateNormal``, ``rest=AutoSkewedNormal`` or
            ``rest=AutoHierarchicalNormal``.
        args: arguments of the model.
        max_iterations: bound of the iterations of L-BFGS.
        num_starts: number of draws of the prior whose bounds are compared, since the posterior may have several modes. Short
            searches then begin at the best three as well as at the guide's own start, and the highest one is finished.
        kwargs: keyword arguments of the model.

    Returns:
        The unconstrained mode.

    Raises:
        InvalidInputError: for another kind of guide, and for counts that aren't positive.
        NonFiniteError: if the second derivative at the mode isn't finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import sample_path
        >>> def model(ts, y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 1.0), torch.zeros(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.1).to_event(1), obs=y)
        >>> guide = AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoMultivariateNormal)
        >>> start_at_mode(guide, torch.linspace(0, 1, 11), torch.zeros(10)).shape
        torch.Size([1])
    """
    check_positive_int(max_iterations, "max_iterations")
    check_positive_int(num_starts, "num_starts", 0)
    whole = isinstance(guide, AutoHierarchicalNormal)
    if not whole and (not isinstance(guide, AutoPathGuide) or not guide.recomputed):
        raise InvalidInputError(
            "a Laplace start needs an AutoPathGuide with feedback='recomputed', or an AutoHierarchicalNormal"
        )
    with poutine.block():
        guide(*args, **kwargs)
    rest: Any = guide if whole else guide.rest
    if rest is None:
        return torch.zeros(0)
    if not isinstance(rest, AutoMultivariateNormal | AutoSkewedNormal | AutoHierarchicalNormal):
        raise InvalidInputError(
            "a Laplace start needs other sites with a normal law",
            got=type(rest).__name__,
            expected="rest=AutoMultivariateNormal, AutoSkewedNormal or AutoHierarchicalNormal",
        )
    site = _LATENT.format(rest._pyro_name)
    seed = int(torch.randint(2**31, ()))

    def bound(u: Tensor) -> Tensor:
        with lent(seed), poutine.block():
            drawn = poutine.trace(poutine.condition(guide, data={site: u})).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(guide.model, drawn)).get_trace(*args, **kwargs)
            law: Any = drawn.nodes[site]["fn"]
            own = law.log_prob(u)
            return model.log_prob_sum() - (drawn.log_prob_sum() - own)

    def slope(u: Tensor) -> Tensor:
        leaf = u.detach().requires_grad_()
        return torch.autograd.grad(bound(leaf), leaf)[0]

    start = rest.loc.detach().clone()
    if num_starts:
        with pyro.validation_enabled(False):
            draws = [_prior_draw(guide.model, rest, args, kwargs) for _ in range(num_starts)]
            climbed = [
                _maximise(bound, u, max(1, max_iterations // 3))
                for u in [start, *_highest(bound, draws, _CLIMBS)]
            ]
            start = _highest(bound, climbed, 1)[0]
    mode = _maximise(bound, start, max_iterations)
    curvature = _curvature(slope, mode)
    with torch.no_grad():
        covariance = torch.linalg.inv(curvature)
        if isinstance(rest, AutoHierarchicalNormal):
            rest.start_at(mode, covariance)
            return mode
        factor = torch.linalg.cholesky(covariance)
        scale = factor.diagonal()
        rest.loc.copy_(mode)
        rest.scale = scale
        rest.scale_tril = (factor / scale.unsqueeze(-1)).contiguous()
    return mode


def _prior_draw(model: Any, rest: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Draw the sites beside the path from the prior, unconstrained and joined as in their guide."""
    with torch.no_grad(), poutine.block():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    parts = []
    for name, _ in rest.prototype_trace.iter_stochastic_nodes():
        site: Any = nodes[name]
        with torch.no_grad():
            parts.append(biject_to(site["fn"].support).inv(site["value"]).reshape(-1))
    return torch.cat(parts)


def _highest(bound: Any, points: list[Tensor], count: int) -> list[Tensor]:
    """Return the points with the greatest bounds, highest first; a bound that isn't a number comes last."""
    heights = torch.full((len(points),), -math.inf, dtype=points[0].dtype, device=points[0].device)
    for i, u in enumerate(points):
        with torch.no_grad(), suppress(NonFiniteError):
            heights[i] = bound(u)
    heights = torch.where(torch.isnan(heights), -math.inf, heights)
    return [points[i] for i in heights.topk(min(count, len(points))).indices.tolist()]


def _maximise(bound: Any, start: Tensor, iterations: int) -> Tensor:
    """Maximise with L-BFGS; a step to where the bound isn't finite is seen as a wall."""
    point = start.requires_grad_()
    optimiser = torch.optim.LBFGS(
        [point], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_change=1e-6
    )

    highest: list[Tensor] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        try:
            loss = -bound(point)
            if torch.isfinite(loss) or not highest:
                loss.backward()
                highest[:] = [torch.maximum(loss.detach(), *highest) if highest else loss.detach()]
                return loss.detach()
        except NonFiniteError:
            if not highest:
                raise
        # finite, and with a slope: what interpolates between two points of the line needs both
        point.grad = torch.zeros_like(point)
        return highest[0] + 1e3 * (1 + highest[0].abs())

    optimiser.step(closure)
    return point.detach()


def _curvature(slope: Any, mode: Tensor, step: float = 1e-3) -> Tensor:
    """Return minus the second derivative at the mode, made positive definite where the mode isn't quite one."""
    rows = []
    # One-sided differences: at the mode the slope itself is small, and the error of order step is far below the width.
    here = slope(mode)
    for direction in step * torch.eye(mode.shape[0], dtype=mode.dtype, device=mode.device):
        rows.append((here - slope(mode + direction)) / step)
    curvature = torch.stack(rows)
    if not bool(torch.isfinite(curvature).all()):
        raise NonFiniteError("the bound has no finite second derivative at its mode", got=mode.tolist())
    values, vectors = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    return (vectors * values.clamp_min(1e-4 * float(values.max().clamp_min(1.0)))) @ vectors.mT
