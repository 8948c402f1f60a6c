"""How two laws differ: the relative control, the increments and the states on given paths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from stochdyn._checks import values_are_checked
from stochdyn.core.law.girsanov import NoiseLaw
from stochdyn.core.law.path import PathSample, stamp_of
from stochdyn.core.law.transition import check_has_density
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.core.sde.methods import Exact
from stochdyn.core.sde.solvers import stepped
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.law.diffusion import DiffusionMeasure

__all__ = ["Relation", "check_equivalent", "relate"]


@dataclass(frozen=True)
class Relation:
    """Two laws on the same increments.

    Attributes:
        q: The first law; p: the second one.
        path: The paths on which they are compared.
        shared: Whether the equations differ by control alone.
        t: The times ``(N, 1, ..., 1)`` before each step; dt: likewise the steps.
        recorded: The law of the increments that generated the path, as noted while it was sampled, or None.
        trusted: Whether the law that drew the path hasn't changed since.
    """

    q: DiffusionMeasure
    p: DiffusionMeasure
    path: PathSample
    shared: bool
    t: Tensor
    dt: Tensor
    recorded: NoiseLaw | None
    trusted: bool = False

    @property
    def source(self) -> SDE | None:
        """The equation that generated the paths, if it is known."""
        return cast("SDE | None", getattr(self.path.law, "sde", None))

    @cached_property
    def z(self) -> Tensor:
        """``(N, *batch, d + m K)`` full states before each step."""
        return self.q.full_state(self.path)[:-1]

    @cached_property
    def e(self) -> Tensor:
        """``(N, *batch, m)`` increments of P's uncontrolled equation as it is now: recorded ones, or read off the states."""
        sde = self.source
        if sde is not None:
            on_p, on_q = sde.shares_base(self.p.sde), sde.shares_base(self.q.sde)
            if on_p or on_q:
                e = self._as_of_now(self._base_increment(sde.control), sde)
                return e if on_p else e + self._gap(self.z) * self.dt
        return self._read_off(self.p.sde)

    def _read_off(self, sde: SDE) -> Tensor:
        """Return the increments with which the uncontrolled equation takes the path from state to state."""
        x = self.path.leading()
        sde = stepped(sde, self.p.method, self.path.ts)
        g = sde.diffusion(self.t, x[:-1])
        dim = x.shape[-1]
        if not (isinstance(g, Matrix) and g.noise_dim(dim) < dim and not sde.noise.num_states):
            check_has_density(sde, g, dim)
        controlled = self.p.sde.control is not None or self.q.sde.control is not None
        if isinstance(g, Matrix) and g.noise_dim(dim) > dim and controlled:
            raise InvalidInputError(
                "the states don't determine the increments, of which there are more",
                got=f"{g.value.shape[-1]} noise channels for {dim} components",
                hint="compare the laws on a path that one of them has drawn",
            )
        slope = sde.drift(self.t, x[:-1])
        excess = x[1:] - x[:-1] - slope * self.dt
        e = g.solve(excess)
        if isinstance(g, Matrix) and g.noise_dim(dim) < dim:
            # Where no noise acts a path of the equation moves with its drift up to what that changes within a step.
            turn = (sde.drift(self.t, x[1:]) - slope) * self.dt
            _check_support(excess - g.apply(e), turn - g.apply(g.solve(turn)), x)
        return e

    def _as_of_now(self, e: Tensor, sde: SDE) -> Tensor:
        """Return recorded increments corrected for what drift and diffusion have changed since the path was drawn.

        The correction is zero where nothing has changed; its derivative is that of the increments on the given states.
        """
        drawn = self.path._drawn
        if self.trusted or drawn is None:
            return e
        x, plain = self.path.leading(), drawn.method == "euler" and not sde.noise.num_states
        if not plain:
            if drawn.stamp != stamp_of(sde):
                raise InvalidInputError(
                    "the law has changed since it drew these paths, and their states don't tell what would drive them now",
                    got=f"noise of {type(sde.noise).__name__}, method {drawn.method!r}",
                    hint="draw the paths again",
                )
            return e
        dim = x.shape[-1]
        g = sde.diffusion(self.t, x[:-1])
        # What the increments would have to be now: e + G^+ (x_{n+1} - x_n - f dt - G e).
        move, slope = x[1:] - x[:-1], sde.drift(self.t, x[:-1]) * self.dt
        g_e = g.apply(e)
        gap = move - slope - g_e
        eps = torch.finfo(x.dtype).eps
        size = x.detach().abs().amax(0) + slope.detach().abs().amax(0)
        tolerance = eps**0.5 * g_e.detach().abs().amax(0) + 64 * eps * size
        changed = gap.detach().abs() > tolerance
        if isinstance(g, Matrix) and g.noise_dim(dim) > dim:
            if bool(changed.any()):
                raise InvalidInputError(
                    "the law has changed since it drew these paths, and their states don't determine the increments",
                    got=f"{g.noise_dim(dim)} noise channels for {dim} components",
                    hint="draw the paths again",
                )
            return e
        gap = torch.where(changed, gap, gap - gap.detach())
        correction = g.solve(gap)
        if isinstance(g, Matrix) and g.noise_dim(dim) < dim:
            _check_support((gap - g.apply(correction)).detach(), torch.zeros_like(gap), x)
        return e + correction

    def law_q(self, z: Tensor | None = None) -> NoiseLaw:
        """Return the law of the increments under Q, at other states ``z`` if given."""
        own = self.source is not None and self.source.control is self.q.sde.control
        if z is None and self.trusted and self.recorded is not None and own:
            law = self.recorded
        else:
            law = _law(self.q.sde.control, self.t, self.z if z is None else z)
        if self.shared:
            return law
        gap = self._gap(self.z if z is None else z)
        return NoiseLaw(gap if law.drift is None else gap + law.drift, law.precision)

    def law_p(self) -> NoiseLaw:
        """Return the law of the increments under P."""
        return _law(self.p.sde.control, self.t, self.z) if self.p.sde.control is not None else NoiseLaw()

    def log_q(self, e: Tensor, z: Tensor) -> Tensor:
        """Return the log density under Q relative to the base, ``(*batch,)``."""
        return self.law_q(z).log_ratio_to_base(e, self.dt).sum(-1).sum(0)

    def log_p(self) -> Tensor:
        """Return the log density under P relative to the base, ``(*batch,)``."""
        return self.law_p().log_ratio_to_base(self.e, self.dt).sum(-1).sum(0)

    def _gap(self, z: Tensor) -> Tensor:
        return _gap(self.q.sde, self.p.sde, self.t, z[..., : self.path.x.shape[-1]])

    def _base_increment(self, control: Control | None) -> Tensor:
        """Return the increments of the uncontrolled equation from those that drove the controlled one."""
        dw = self.path.dw.movedim(-2, 0)
        if control is None:
            return dw
        law = self.recorded or _law(control, self.t, self.z)
        if law.precision is not None:
            dw = dw * torch.rsqrt(1 + law.precision * self.dt)
        return dw if law.drift is None else dw + law.drift * self.dt


def relate(q: DiffusionMeasure, p: DiffusionMeasure, path: PathSample, recorded: bool = False) -> Relation:
    """Bring two laws and a path on common ground.

    Args:
        q: The first law.
        p: The second law.
        path: The paths.
        recorded: The law that drew the paths hasn't changed since, so that what it noted then holds now.

    Raises:
        DiffusionMismatchError: If the laws are mutually singular.
        InvalidInputError: If exact steps of one have other noise than those of the other.
    """
    x = path.leading()[:-1]
    t, dt = time_column(path.ts[..., :-1], x), steps_of(path.ts, x)
    shared = q.sde.shares_base(p.sde)
    if not shared:
        if isinstance(q.method, Exact) or isinstance(p.method, Exact):
            raise InvalidInputError(
                "exact steps of laws with other drifts have other noise, so their paths don't share increments",
                hint="compare their log_prob, or give both method='euler' and small steps",
            )
        check_equivalent(q.sde, p.sde, t, x)
    return Relation(q, p, path, shared, t, dt, _noted(path), recorded)


def _noted(path: PathSample) -> NoiseLaw | None:
    known = {name: path.aux[name].movedim(-2, 0) for name in ("control", "precision") if name in path.aux}
    return NoiseLaw(known.get("control"), known.get("precision")) if known else None


def _law(control: Control | None, t: Tensor, z: Tensor) -> NoiseLaw:
    if control is None:
        return NoiseLaw()
    if type(control).shape_increment is not Control.shape_increment:
        raise InvalidInputError(
            "log_rn knows controls by their drift and precision only", got=type(control).__name__
        )
    u, precision = control.at(t, z)
    return NoiseLaw(_check_fits(u, z, "control's drift"), _check_fits(precision, z, "control's precision"))


def _check_fits(value: Tensor | None, z: Tensor, name: str) -> Tensor | None:
    """Raise ShapeError if a function grows batch axes when time leads; broadcasting would hide it."""
    if value is not None and (
        value.ndim > z.ndim
        or any(a not in (1, b) for a, b in zip(value.shape[-2::-1], z.shape[-2::-1], strict=False))
    ):
        raise ShapeError(
            f"the {name} has more axes than its states when time leads",
            got=f"shape {tuple(value.shape)} for t {(z.shape[0], *(1,) * (z.ndim - 1))}, z {tuple(z.shape)}",
            hint="write it for t that broadcasts to z[..., :1]; what is indexed by t needs t.squeeze(-1)",
        )
    return value


def _gap(q: SDE, p: SDE, t: Tensor, x: Tensor) -> Tensor:
    mine, theirs = (_check_fits(sde.drift(t, x), x, "drift") for sde in (q, p))
    return p.diffusion(t, x).solve((mine - theirs).expand_as(x))  # type: ignore[operator]


def check_equivalent(q: SDE, p: SDE, t: Tensor, x: Tensor) -> None:
    """Raise unless the diffusions agree on the path and the drifts differ only where noise acts."""
    dim = x.shape[-1]
    with torch.no_grad():
        if not q._same_noise(p):
            raise DiffusionMismatchError(
                "the laws are driven by different noise", hint="share one noise object"
            )
        a, b = q.diffusion(t, x), p.diffusion(t, x)
        # Entries are compared in the unit of their components, and every state by itself.
        mine, theirs = a.covariance(dim).to(x), b.covariance(dim).to(x)
        unit = theirs.diagonal(dim1=-2, dim2=-1).sqrt()
        gap = (mine - theirs).abs()
        if bool((gap > 1e-5 * unit.unsqueeze(-1) * unit.unsqueeze(-2)).any()):
            raise DiffusionMismatchError(
                "the laws have different diffusions and are mutually singular",
                got=f"largest difference {float(gap.max()):.3g} in G G^T",
                hint="give both the same diffusion",
            )
        same = a.noise_dim(dim) == b.noise_dim(dim)
        if not same or bool(((a.matrix(dim) - b.matrix(dim)).to(x).abs() > 1e-4 * unit.unsqueeze(-1)).any()):
            raise DiffusionMismatchError(
                "the laws have the same G G^T but arrange their noise channels differently",
                hint="give both the same matrix G",
            )
        if p.state_dependent or (isinstance(b, Matrix) and b.value.shape[-1] < dim):
            first, second = q.drift(t, x).expand_as(x), p.drift(t, x).expand_as(x)
            v = first - second
            left = (v - b.apply(b.solve(v))).abs()
            rounding = 256 * torch.finfo(x.dtype).eps * torch.maximum(first.abs(), second.abs()).amax(0)
            if bool((left > 1e-4 * v.abs().amax(0) + rounding).any()):
                raise DiffusionMismatchError(
                    "the drifts differ in a direction without noise, so the laws are mutually singular",
                    got=f"a difference of {left.max().item():.3g} there",
                )


def _check_support(left: Tensor, allowed: Tensor, x: Tensor) -> None:
    """Raise unless what a path moves beside its drift where no noise acts is as small as that of a path of the law.

    Every path and every component is judged by itself, over all its steps.
    """
    if not values_are_checked():
        return
    moved = (x[1:] - x[:-1]).detach().square().mean(0)
    rounding = (64 * torch.finfo(x.dtype).eps * x.detach().abs().amax(0)).square()
    bound = 16 * allowed.detach().square().mean(0) + torch.finfo(x.dtype).eps * moved + rounding
    if bool((left.detach().square().mean(0) > bound).any()):
        raise DiffusionMismatchError(
            "the path moves in a direction without noise otherwise than the drift says, so it is impossible under both laws",
            got=f"a distance of {left.detach().abs().max().item():.3g} in one step",
        )
