"""A guide for the parameters of hierarchical models: members of a plate given the parameters that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from stochdyn._checks import (
    check_callable,
    check_positive,
    check_positive_int,
)
from stochdyn.core.law.girsanov import explicit_stop
from stochdyn.infer.latent_layout import LatentGroup, latent_groups
from stochdyn.infer.naming import fresh_name, rename

__all__ = ["AutoHierarchicalNormal"]

# Tails are never lighter than this, a little heavier than normal, so that importance weights stay bounded. The bound hardly
# sees tails, so a free weight would drift.
_TAIL = 0.1
# How much wider the wide share is.
_WIDE = 2.5
# The largest change of a log scale by the network; a funnel over twenty orders of magnitude is no posterior of data.
_LOG_RANGE = 4.0


class _Group(PyroModule):
    """The law of the values of one group, given the standardised values of its parents."""

    def __init__(
        self, group: LatentGroup, width: int, inputs: int, hidden: int, like: Tensor, scale: float
    ) -> None:
        super().__init__()
        members = group.index.shape[0]
        self.loc = nn.Parameter(like.new_zeros(members, width))
        self.log_scale = nn.Parameter(like.new_full((members, width), scale).log())
        self.lower = nn.Parameter(like.new_zeros(members, width, width))
        self.skew = nn.Parameter(like.new_zeros(members, width))
        self.heaviness = nn.Parameter(like.new_full((members, width), -2.25))
        self.inputs = inputs
        if inputs:
            self.slope = nn.Parameter(like.new_zeros(members, width, inputs))
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(hidden, inputs, generator=generator) / inputs**0.5
            self.mix = nn.Parameter(weight.to(like))
            self.bias = nn.Parameter(torch.linspace(-1.5, 1.5, hidden).to(like))
            self.bend = nn.Parameter(like.new_zeros(members, 2 * width, hidden))

    def parts(self, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the shift ``(..., P, W)`` and the log scale ``(..., P, W)``, given the parents' values ``(..., P, A)``."""
        shift: Tensor = self.loc
        log_scale: Tensor = self.log_scale
        if seen is not None:
            unit = torch.tanh(seen @ self.mix.mT + self.bias) - torch.tanh(self.bias)
            # The mean over the hidden units, so that their number doesn't set the pace of learning.
            bend = 2.0 * (self.bend @ unit.unsqueeze(-1)).squeeze(-1) / unit.shape[-1]
            width = shift.shape[-1]
            linear = (self.slope @ seen.unsqueeze(-1)).squeeze(-1)
            # A linear shift and a network for the rest: shift and width of a member change with what it shares.
            shift = shift + log_scale.exp() * bend[..., :width] + linear
            log_scale = log_scale + _LOG_RANGE * torch.tanh(bend[..., width:] / _LOG_RANGE)
        return shift, log_scale

    @property
    def tail(self) -> Tensor:
        """The weight of the tails, ``(P, W)``: 0 is normal."""
        return _TAIL + nn.functional.softplus(self.heaviness)

    @property
    def is_scalar(self) -> bool:
        """Whether a member has one value, so that nothing is correlated."""
        return self.loc.shape[-1] == 1

    def inverse(self) -> Tensor:
        """Return the inverses of :meth:`factor`."""
        factor = self.factor()
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        return torch.linalg.solve_triangular(factor, eye, upper=False, unitriangular=True)

    def factor(self) -> Tensor:
        """Return the unit lower triangular matrices ``(P, W, W)`` of the correlations."""
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        return self.lower.tril(-1) + eye


class _Triangular(Transform):
    """The map from standard normal values to latent values, group by group."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, groups: list[LatentGroup], laws: list[_Group], stop: bool = False) -> None:
        super().__init__()
        self.groups, self.laws, self.stop = groups, laws, stop

    def _seen(self, group: LatentGroup, found: list[Tensor]) -> Tensor | None:
        if not group.parents:
            return None
        return torch.cat([found[k][..., member, :] for k, member in group.parents], -1)

    def forward_with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent values and the log determinant of the derivative."""
        found: list[Tensor] = []
        places, values = [], []
        slope = x.new_zeros(x.shape[:-1])
        for group, law in zip(self.groups, self.laws, strict=True):
            e = x[..., group.index]
            shift, log_scale = law.parts(self._seen(group, found))
            bent, log_slope = _bend(e, law)
            if not law.is_scalar:
                bent = (law.factor() @ bent.unsqueeze(-1)).squeeze(-1)
            u = shift + log_scale.exp() * bent
            slope = slope + (log_slope + log_scale).sum((-2, -1))
            found.append(e)
            places.append(group.index.flatten())
            values.append(u.flatten(-2))
        return _placed(places, values), slope

    def inverse_with_slope(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standard normal values and the log determinant of the derivative of the map from them."""
        found: list[Tensor] = []
        places, values = [], []
        slope = y.new_zeros(y.shape[:-1])
        for group, law in zip(self.groups, self.laws, strict=True):
            shift, log_scale = law.parts(self._seen(group, found))
            gap = (y[..., group.index] - shift) * torch.exp(-log_scale)
            bent = gap if law.is_scalar else (law.inverse() @ gap.unsqueeze(-1)).squeeze(-1)
            e, log_slope = _unbend(bent, law)
            slope = slope + (log_slope + log_scale).sum((-2, -1))
            found.append(e)
            places.append(group.index.flatten())
            values.append(e.flatten(-2))
        return _placed(places, values), slope

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_with_slope(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_with_slope(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant of the derivative."""
        return self.forward_with_slope(x)[1]


class _TriangularNormal(dist.TorchDistribution):
    """The law of the latent vector; its score is that of the draw alone."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 (torch's protocol)
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, transform: _Triangular, like: Tensor, share: float, batch_shape: torch.Size = torch.Size()
    ) -> None:
        self.transform, self.like, self.share = transform, like, share
        super().__init__(batch_shape, like.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _TriangularNormal:
        """Return independent copies."""
        return _TriangularNormal(self.transform, self.like, self.share, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw latent vectors."""
        shape = self._extended_shape(torch.Size(sample_shape))
        e = torch.randn(shape, dtype=self.like.dtype, device=self.like.device)
        if self.share:
            wide = torch.rand(shape[:-1], dtype=e.dtype, device=e.device) < self.share
            e = torch.where(wide.unsqueeze(-1) & self._shared, _WIDE * e, e)
        return self.transform(e)

    @property
    def _shared(self) -> Tensor:
        """Which values ``(D,)`` stand outside all plates."""
        group = self.transform.groups[0]
        mask = torch.zeros(self.like.shape, dtype=torch.bool, device=self.like.device)
        return mask if group.parents or group.index.shape[0] > 1 else mask.index_fill(0, group.index[0], True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density ``(...)`` of latent vectors ``(..., D)``."""
        e, slope = self.transform.inverse_with_slope(value)
        each = dist.Normal(torch.zeros_like(e), torch.ones_like(e)).log_prob(e)
        if self.share:
            # (1 - s) N(e; 0, 1) + s N(e; 0, w^2), of all shared values together
            shared = self._shared
            size, square = int(shared.sum()), (e.square() * shared).sum(-1)
            ratio = 0.5 * square * (1.0 - _WIDE**-2) - size * math.log(_WIDE)
            return (
                each.sum(-1)
                + torch.logaddexp(
                    torch.full_like(ratio, math.log1p(-self.share)), ratio + math.log(self.share)
                )
                - slope
            )
        return each.sum(-1) - slope

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Report the density and differentiate it along the draw alone, whose gradient vanishes at the optimum."""
        zero: Any = 0
        return ScoreParts(self.log_prob(x), zero, explicit_stop(lambda inputs: self.log_prob(*inputs), (x,)))


def _bend(e: Tensor, law: _Group) -> tuple[Tensor, Tensor]:
    """Apply skewness and tails by the sinh-arcsinh transform; return the values and the log slopes."""
    stretch = law.tail.exp()
    raised = stretch * torch.asinh(e) + law.skew
    bent = (torch.sinh(raised) - torch.sinh(law.skew)) / (stretch * torch.cosh(law.skew))
    return bent, _log_slope(e, raised, law)


def _unbend(bent: Tensor, law: _Group) -> tuple[Tensor, Tensor]:
    """Undo :func:`_bend`; return the standard values and the log slopes there."""
    stretch = law.tail.exp()
    raised = torch.asinh(bent * stretch * torch.cosh(law.skew) + torch.sinh(law.skew))
    e = torch.sinh((raised - law.skew) / stretch)
    return e, _log_slope(e, raised, law)


def _log_slope(e: Tensor, raised: Tensor, law: _Group) -> Tensor:
    # d/de sinh(exp(tau) asinh(e) + s) / (exp(tau) cosh(s)) = cosh(raised) / (sqrt(1 + e^2) cosh(s))
    return _log_cosh(raised) - 0.5 * torch.log1p(e.square()) - _log_cosh(law.skew)


def _log_cosh(x: Tensor) -> Tensor:
    return x.abs() + torch.log1p(torch.exp(-2.0 * x.abs())) - 0.6931471805599453


def _placed(places: list[Tensor], values: list[Tensor]) -> Tensor:
    order = torch.cat(places)
    return torch.cat(values, -1)[..., torch.argsort(order)]


class AutoHierarchicalNormal(AutoContinuous):
    r"""A guide over all latent sites on their unconstrained scale that follows the plates of the model.

    The parameters outside all plates have a joint, skewed normal law. The values of each member of a plate have one given the
    parameters that it shares,

    .. math:: u_i = m_i + M_i\epsilon + \sigma_i f_i(\epsilon) + \sigma_i e^{g_i(\epsilon)} L_i\,S_{s,\tau}(\epsilon_i),

    where :math:`\epsilon` are the standardised shared values, :math:`f_i, g_i` come from a small network and :math:`S` is the
    sinh-arcsinh transform (skewness, tails). So effects of members narrow and move with the spread that they share, as they do
    in funnels, and members are independent of each other given it, so that the cost grows with their number and no faster.

    Use it for hierarchical models, and for a few parameters without plates, where it is a skewed normal law. Sites in
    subsampled plates need a guide that reads the data.

    Args:
        model: A Pyro model.
        init_loc_fn: The function that says where the guide starts, site by site.
        init_scale: The width at the start, on the unconstrained scale.
        hidden: The number of hidden units of the network.

    Attributes:
        wide_share: The share of the draws whose shared values are 2.5 times as wide, zero while the guide is trained. A share of
            0.1 bounds the weights of what a trained guide leaves out, at the cost of a tenth of the draws.

    Raises:
        InvalidInputError: If a width isn't positive.

    Example:
        >>> import pyro
        >>> def model():
        ...     spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("subject", 3):
        ...         pyro.sample("effect", dist.Normal(0.0, spread))
        >>> guide = AutoHierarchicalNormal(model)
        >>> guide()["effect"].shape
        torch.Size([3])

    Reference:
        The transform is that of Jones and Pewsey, Biometrika 96, 2009; the wide share is the defensive mixture of Hesterberg,
        Technometrics 37, 1995; the gradient that of Roeder, Wu and Duvenaud, Sticking
        the landing, 2017.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        hidden: int = 8,
    ) -> None:
        check_callable(model, "model", "a Pyro model")
        check_positive(init_scale, "init_scale")
        check_positive_int(hidden, "hidden")
        self._init_scale, self._hidden = init_scale, hidden
        self.wide_share = 0.0
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._pyro_name = fresh_name(type(self).__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rename(self, type(self).__name__)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        loc = self._init_loc()
        self.groups = latent_groups(self.prototype_trace, self._unconstrained_shapes)
        widths = [g.index.shape[-1] for g in self.groups]
        self.laws = PyroModule("laws")
        for k, group in enumerate(self.groups):
            inputs = sum(widths[number] for number, _ in group.parents)
            law = _Group(group, widths[k], inputs, self._hidden, loc, self._init_scale)
            setattr(self.laws, f"group_{k}", law)
            with torch.no_grad():
                law.loc.copy_(loc[group.index])

    def _laws(self) -> list[_Group]:
        return [getattr(self.laws, f"group_{k}") for k in range(len(self.groups))]

    @property
    def loc(self) -> Tensor:
        """The location ``(D,)`` of the latent vector."""
        laws = self._laws()
        return _placed([g.index.flatten() for g in self.groups], [law.loc.flatten() for law in laws])

    def start_at(self, mean: Tensor, covariance: Tensor) -> None:
        """Put the guide to a normal law.

        Args:
            mean: The mean of the latent vector, ``(D,)``.
            covariance: Its covariance ``(D, D)``. What members of a plate have in common beyond the parameters that they share
                is left out.
        """
        # The law of each group given its parents, and the derivative of its values in the standard ones, group by group.
        standard: list[Tensor] = []
        with torch.no_grad():
            for group, law in zip(self.groups, self._laws(), strict=True):
                own = covariance[group.index.unsqueeze(-1), group.index.unsqueeze(-2)]
                law.loc.copy_(mean[group.index])
                jacobian = None
                if group.parents:
                    # Gaussian regression on the parents: slope C_ab C_bb^-1, remainder C_aa - C_ab C_bb^-1 C_ba.
                    above = torch.cat([self.groups[k].index[member] for k, member in group.parents], -1)
                    cross = covariance[group.index.unsqueeze(-1), above.unsqueeze(-2)]
                    theirs = covariance[above.unsqueeze(-1), above.unsqueeze(-2)]
                    slope = torch.linalg.solve(theirs, cross.mT).mT
                    own = own - slope @ cross.mT
                    jacobian = slope @ self._jacobian(group, standard)
                    law.slope.copy_(jacobian)
                factor = torch.linalg.cholesky(_positive(own))
                scale = factor.diagonal(dim1=-2, dim2=-1)
                law.log_scale.copy_(scale.log())
                law.lower.copy_((factor / scale.unsqueeze(-1)).tril(-1))
                standard.append(factor if jacobian is None else torch.cat([jacobian, factor], -1))

    def _jacobian(self, group: LatentGroup, standard: list[Tensor]) -> Tensor:
        """Return the derivative of the parents' values in their standard values, ``(P, A, A)``."""
        sizes = [self.groups[k].index.shape[-1] for k, _ in group.parents]
        total, members = sum(sizes), group.index.shape[0]
        result = standard[0].new_zeros(members, total, total)
        places = {k: sum(sizes[:i]) for i, (k, _) in enumerate(group.parents)}
        for i, (k, member) in enumerate(group.parents):
            row = slice(places[k], places[k] + sizes[i])
            # Columns of a group's derivative: its own parents in order, then itself.
            columns = [n for n, _ in self.groups[k].parents] + [k]
            at = 0
            for n in columns:
                width = self.groups[n].index.shape[-1]
                column = slice(places[n], places[n] + width)
                result[:, row, column] = standard[k][member][..., at : at + width]
                at += width
        return result

    def get_base_dist(self) -> Any:
        """Return the standard normal law before the transform."""
        loc = self.loc.detach()
        return dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return the map from standard normal values to latent values."""
        return _Triangular(self.groups, self._laws())

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the law of the latent vector."""
        return _TriangularNormal(_Triangular(self.groups, self._laws()), self.loc.detach(), self.wide_share)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            e = torch.randn(1000, self.latent_dim, generator=torch.Generator().manual_seed(0)).to(self.loc)
            draws = _Triangular(self.groups, self._laws())(e)
        return draws.median(0).values, draws.std(0)


def _positive(matrix: Tensor) -> Tensor:
    """Return the nearest positive definite matrices, up to rounding."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    floor = 1e-6 * values.amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    return (vectors * torch.maximum(values, floor).unsqueeze(-2)) @ vectors.mT
