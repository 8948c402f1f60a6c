"""How two laws differ: the relative control, the increments and the states on given paths."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from stochdyn.core.law.girsanov import NoiseLaw
from stochdyn.core.law.path import PathSample
from stochdyn.core.law.transition import check_has_density
from stochdyn.core.sde.coefficients import Coefficient, Matrix
from stochdyn.core.sde.equation import SDE, Control
from stochdyn.core.sde.grids import steps_of, time_column
from stochdyn.errors import DiffusionMismatchError, InvalidInputError, ShapeError

if TYPE_CHECKING:
    from stochdyn.core.law.diffusion import DiffusionMeasure

__all__ = ["Relation", "relate"]


@dataclass(frozen=True)
class Relation:
    """Two laws on the same increments.

    Attributes:
        q: the first law; p: the second one.
        path: the paths on which they are compared.
        shared: whether the equations differ by control alone.
        t: ``(N, 1, ..., 1)`` times before each step; dt: likewise the steps.
        recorded: the law of the increments that generated the path, as noted while it was sampled, or None.
    """

    q: DiffusionMeasure
    p: DiffusionMeasure
    path: PathSample
    shared: bool
    t: Tensor
    dt: Tensor
    recorded: NoiseLaw | None

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
        """``(N, *batch, m)`` increments of P's uncontrolled equation, recorded ones or from the states."""
        sde = self.source
        if sde is not None:
            on_p, on_q = sde.shares_base(self.p.sde), sde.shares_base(self.q.sde)
            if on_p or on_q:
                e = self._base_increment(sde.control)
                return e if on_p else e + self._gap(self.z) * self.dt
        x = self.path.leading()
        g = self.p.sde.diffusion(self.t, x[:-1])
        check_has_density(self.p.sde, g, x.shape[-1])
        controlled = self.p.sde.control is not None or self.q.sde.control is not None
        if isinstance(g, Matrix) and g.value.shape[-1] > x.shape[-1] and controlled:
            raise InvalidInputError(
                "the states don't determine the increments, of which there are more",
                got=f"{g.value.shape[-1]} noise channels for {x.shape[-1]} components",
                hint="compare the laws on a path that one of them has drawn",
            )
        return g.solve(x[1:] - x[:-1] - self.p.sde.drift(self.t, x[:-1]) * self.dt)

    def law_q(self, z: Tensor | None = None) -> NoiseLaw:
        """Return the law of the increments under Q, at other states ``z`` if given."""
        own = self.source is not None and self.source.control is self.q.sde.control
        if z is None and self.recorded is not None and own:
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


def relate(q: DiffusionMeasure, p: Any, path: PathSample, recorded: bool = False) -> Relation:
    """Bring two laws and a path on common ground.

    Args:
        q: the first law.
        p: the second law.
        path: the paths.
        recorded: take the control of the law that drew the paths as noted then, not as it is now.

    Raises:
        DiffusionMismatchError: if the laws are mutually singular.
    """
    if not hasattr(p, "sde"):
        raise DiffusionMismatchError("log_rn compares two DiffusionMeasures", got=type(p).__name__)
    x = path.leading()[:-1]
    t, dt = time_column(path.ts[..., :-1], x), steps_of(path.ts, x)
    shared = q.sde.shares_base(p.sde)
    if not shared:
        _check_equivalent(q.sde, p.sde, t, x)
    return Relation(q, p, path, shared, t, dt, _noted(path) if recorded else None)


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


def _check_equivalent(q: SDE, p: SDE, t: Tensor, x: Tensor) -> None:
    """Raise unless the diffusions agree on the path and the drifts differ only where noise acts."""
    dim = x.shape[-1]
    with torch.no_grad():
        if not q._same_noise(p):
            raise DiffusionMismatchError(
                "the laws are driven by different noise", hint="share one noise object"
            )
        a, b = q.diffusion(t, x), p.diffusion(t, x)
        if not _same(a, b, dim):
            raise DiffusionMismatchError(
                "the laws have different diffusions and are mutually singular",
                got=f"largest difference {_difference(a, b, dim):.3g} in G G^T",
                hint="give both the same diffusion",
            )
        if not torch.allclose(a.matrix(dim).to(x), b.matrix(dim).to(x), rtol=1e-4, atol=1e-7):
            raise DiffusionMismatchError(
                "the laws have the same G G^T but arrange their noise channels differently",
                hint="give both the same matrix G",
            )
        if isinstance(b, Matrix) and b.value.shape[-1] < dim:
            v = (q.drift(t, x) - p.drift(t, x)).expand_as(x)
            left = v - b.apply(b.solve(v))
            if bool(left.abs().max() > 1e-4 * v.abs().max().clamp_min(1e-12)):
                raise DiffusionMismatchError(
                    "the drifts differ in a direction without noise, so the laws are mutually singular",
                    got=f"a difference of {left.abs().max().item():.3g} there",
                )


def _same(a: Coefficient, b: Coefficient, dim: int) -> bool:
    if type(a) is type(b) and a.value.shape == b.value.shape:
        return bool(torch.allclose(a.value, b.value, rtol=1e-5, atol=1e-8))
    return _difference(a, b, dim) <= 1e-5 * float(a.covariance(dim).abs().max())


def _difference(a: Coefficient, b: Coefficient, dim: int) -> float:
    return float((a.covariance(dim) - b.covariance(dim)).abs().max())
