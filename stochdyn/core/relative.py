"""How two laws differ: the relative control, the increments and the states on given paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn.core.coefficients import Coefficient, Matrix
from stochdyn.core.girsanov import NoiseLaw
from stochdyn.core.path import PathSample
from stochdyn.core.sde import SDE, Control
from stochdyn.core.transition import check_has_density, steps_of, time_column
from stochdyn.errors import DiffusionMismatchError

if TYPE_CHECKING:
    from stochdyn.core.measure import DiffusionMeasure

__all__ = ["Relation", "relate"]


@dataclass(frozen=True)
class Relation:
    """Two laws on the same increments.

    Attributes:
        q: the first equation; p: the second one.
        gap: ``G^+ (f_Q - f_P)`` at given states, or None where both have the same drift.
        t: ``(N, 1, ..., 1)``; dt: likewise.
        z: ``(N, *batch, d + m K)`` full states before each step.
        e: ``(N, *batch, m)`` increments of P's uncontrolled equation.
    """

    q: SDE
    p: SDE
    shared: bool
    dim: int
    t: Tensor
    dt: Tensor
    z: Tensor
    e: Tensor

    def law_q(self, z: Tensor | None = None) -> NoiseLaw:
        """Return the law of the increments under Q."""
        z = self.z if z is None else z
        law = _law(self.q.control, self.t, z)
        if self.shared:
            return law
        gap = _gap(self.q, self.p, self.t, z[..., : self.dim])
        return NoiseLaw(gap if law.drift is None else gap + law.drift, law.precision)

    def law_p(self) -> NoiseLaw:
        """Return the law of the increments under P."""
        return _law(self.p.control, self.t, self.z)

    def log_q(self, e: Tensor, z: Tensor) -> Tensor:
        """Return the log density under Q relative to the base, ``(*batch,)``."""
        return self.law_q(z).log_ratio_to_base(e, self.dt).sum(-1).sum(0)

    def log_p(self) -> Tensor:
        """Return the log density under P relative to the base, ``(*batch,)``."""
        return self.law_p().log_ratio_to_base(self.e, self.dt).sum(-1).sum(0)


def relate(q: DiffusionMeasure, p: Any, path: PathSample) -> Relation:
    """Bring two laws and a path on common ground.

    Raises:
        DiffusionMismatchError: if the laws are mutually singular.
    """
    if not hasattr(p, "sde"):
        raise DiffusionMismatchError("log_rn compares two DiffusionMeasures", got=type(p).__name__)
    states = q.full_state(path)
    z, dim = states[:-1], path.x.shape[-1]
    t, dt = time_column(path.ts[:-1], z), steps_of(path.ts, z)
    shared = q.sde.shares_base(p.sde)
    if not shared:
        _check_equivalent(q.sde, p.sde, t, z[..., :dim])
    e = _increments(q, p, path, t, dt, z, dim)
    return Relation(q.sde, p.sde, shared, dim, t, dt, z, e)


def _law(control: Control | None, t: Tensor, z: Tensor) -> NoiseLaw:
    if control is None:
        return NoiseLaw()
    drift = None if control.drift is None else control.drift(t, z)
    return NoiseLaw(drift, None if control.precision is None else control.precision(t, z))


def _gap(q: SDE, p: SDE, t: Tensor, x: Tensor) -> Tensor:
    return p.diffusion(t, x).solve((q.drift(t, x) - p.drift(t, x)).expand_as(x))


def _increments(
    q: DiffusionMeasure, p: Any, path: PathSample, t: Tensor, dt: Tensor, z: Tensor, dim: int
) -> Tensor:
    """Return the increments of P's uncontrolled equation: from the recorded ones, or from the states."""
    law = path.law
    if law is not None:
        sde = law.sde  # type: ignore[union-attr]
        on_p, on_q = sde.shares_base(p.sde), sde.shares_base(q.sde)
        if on_p or on_q:
            e = _base_increment(sde.control, path.dw.movedim(-2, 0), t, dt, z)
            return e if on_p else e + _gap(q.sde, p.sde, t, z[..., :dim]) * dt
    x = path.leading()
    g = p.sde.diffusion(t, x[:-1])
    check_has_density(p.sde, g, dim)
    return g.solve(x[1:] - x[:-1] - p.sde.drift(t, x[:-1]) * dt)


def _base_increment(control: Control | None, dw: Tensor, t: Tensor, dt: Tensor, z: Tensor) -> Tensor:
    if control is None:
        return dw
    law = _law(control, t, z)
    if law.precision is not None:
        dw = dw * torch.rsqrt(1 + law.precision * dt)
    return dw if law.drift is None else dw + law.drift * dt


def _check_equivalent(q: SDE, p: SDE, t: Tensor, x: Tensor) -> None:
    """Raise unless the diffusions agree on the path and the drifts differ only where noise acts."""
    dim = x.shape[-1]
    with torch.no_grad():
        if not q._same_noise(p):
            raise DiffusionMismatchError("the laws are driven by different noise", hint="share one noise object")
        a, b = q.diffusion(t, x), p.diffusion(t, x)
        if not _same(a, b, dim):
            raise DiffusionMismatchError(
                "the laws have different diffusions and are mutually singular",
                got=f"largest difference {_difference(a, b, dim):.3g} in G G^T",
                hint="give both the same diffusion",
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
