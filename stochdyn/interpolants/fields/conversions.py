r"""Conversions between what networks learn: velocity, its smooth part, score, denoiser and the two ends' means.

All are linear combinations of :math:`(\eta_0,\eta_1,\eta_z)`, which obey :math:`\alpha\eta_0+\beta\eta_1+\gamma\eta_z=x`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn._checks import check_choice
from stochdyn.errors import InvalidInputError, UnavailableError
from stochdyn.interpolants.paths.interpolant import TARGETS, Interpolant

__all__ = ["check_known", "conversion", "convert"]

_MOVING = ("velocity", "v", "denoiser", "score")


def check_known(interpolant: Interpolant, known: Sequence[str]) -> None:
    """Raise unless fields of these names belong to the path and don't repeat one another.

    Raises:
        InvalidInputError: if there is none, or more than two; if two of them say the same; or if the path has no such
            field.
    """
    if not 1 <= len(known) <= 2:
        raise InvalidInputError(
            "give one or two fields to learn", got=list(known) or "none", expected=list(TARGETS)
        )
    for name in known:
        check_choice(name, TARGETS, "field")
        if name in ("score", "denoiser") and interpolant.kind != "one-sided" and not interpolant.has_latent:
            raise InvalidInputError(
                f"a path without a latent has no {name}", got="gamma = 0", hint="give the interpolant a gamma"
            )
        if name in ("eta0", "v") and interpolant.kind == "mirror":
            raise InvalidInputError(
                f"on a mirror path {name} says nothing", got=name, hint="learn the denoiser"
            )
        if name in ("eta0", "eta1") and interpolant.correction is not None:
            raise InvalidInputError(
                f"a path with a correction isn't linear, so {name} gives no velocity", got=name
            )
    pair = set(known)
    same = [{"score", "denoiser"}]
    if interpolant.kind == "one-sided":
        same += [{"velocity", "v"}, {"denoiser", "eta0"}, {"score", "eta0"}]
    elif not interpolant.has_latent:
        same += [{"velocity", "v"}]
    if len(known) == 2 and (len(pair) == 1 or pair in same):
        raise InvalidInputError("two fields that determine one another add nothing", got=" and ".join(known))


def conversion(
    interpolant: Interpolant, known: Sequence[str], target: str, t: Tensor, clip: float = 1e-3
) -> tuple[Tensor | None, list[Tensor | None]]:
    r"""Return the coefficients of a field in terms of the known ones.

    .. math:: f = c_x\,x+\sum_kc_k\,f_k

    Where a coefficient grows without bound towards an end of [0, 1] it is held at ``clip`` from there.

    Args:
        interpolant: the path.
        known: names of one or two fields.
        target: name of the field wanted.
        t: times of any shape.
        clip: distance from the ends at which singular coefficients are held.

    Returns:
        ``c_x`` and the list of ``c_k``, each of the shape of ``t``, or None for zero.

    Raises:
        UnavailableError: if the known fields don't determine the target.

    Example:
        >>> it = Interpolant("one-sided-linear")
        >>> conversion(it, ["velocity"], "eta1", torch.tensor(0.25))
        (tensor(1.), [tensor(0.7500)])
    """
    check_choice(target, TARGETS, "target")
    if target in known:
        return None, [torch.ones_like(t) if name == target else None for name in known]
    inner = t.clamp(clip, 1 - clip)
    direct = _without_points(interpolant, known, target, inner)
    if direct is not None:
        return None, direct
    table = _rows(interpolant, inner)
    unknowns = {"one-sided": (0, 1), "mirror": (1, 2)}.get(interpolant.kind, (0, 1, 2))
    if interpolant.kind == "two-sided" and not interpolant.has_latent:
        unknowns = (0, 1)
    # where one field is enough, a second one isn't asked
    asked = list(known)[: len(unknowns) - 1]
    if interpolant.correction is not None or len(asked) < len(unknowns) - 1 or target not in table:
        raise UnavailableError(
            f"{' and '.join(known)} don't determine the {target}",
            hint="learn a second field, such as the denoiser beside the velocity",
        )
    system = [[table[name][i] for i in unknowns] for name in ("x", *asked)]
    solved = _solve(system, [table[target][i] for i in unknowns])
    if solved is None:
        raise UnavailableError(
            f"{' and '.join(asked)} don't determine the {target} at every time of this path"
        )
    return solved[0], [*solved[1:], *[None] * (len(known) - len(asked))]


def _without_points(
    it: Interpolant, known: Sequence[str], target: str, t: Tensor
) -> list[Tensor | None] | None:
    """Return the coefficients where x itself isn't needed, or None."""
    if it.kind == "one-sided":
        noise = {"denoiser": None, "eta0": None, "score": it.alpha}
    else:
        noise = {"denoiser": None, "score": it.gamma}

    def per_denoiser(name: str) -> Tensor:
        return -noise[name].value(t).reciprocal() if noise[name] is not None else torch.ones_like(t)  # type: ignore[union-attr]

    if target in noise:
        for i, name in enumerate(known):
            if name in noise:
                out: list[Tensor | None] = [None] * len(known)
                out[i] = per_denoiser(target) / per_denoiser(name)
                return out
    if it.kind == "one-sided" or not it.has_latent:
        if {target} <= {"velocity", "v"} and any(n in ("velocity", "v") for n in known):
            return [torch.ones_like(t) if n in ("velocity", "v") else None for n in known]
        return None
    slots = {n: i for i, n in enumerate(known)}
    half = 0.5 * it.gamma.square_derivative(t)
    out = [None] * len(known)
    if target in ("velocity", "v"):
        other = "v" if target == "velocity" else "velocity"
        latent = next((n for n in known if n in noise), None)
        if other in slots and latent is not None:
            # b = v - gamma gamma' s: the product is finite where gamma' is not
            sign = 1.0 if target == "velocity" else -1.0
            out[slots[other]] = torch.ones_like(t)
            out[slots[latent]] = -sign * half / (1.0 if latent == "score" else -it.gamma.value(t))
            return out
        return None
    if target in noise and {"velocity", "v"} <= set(slots):
        scale = per_denoiser(target) / it.gamma.derivative(t)
        out[slots["velocity"]], out[slots["v"]] = scale, -scale
        return out
    return None


def _rows(it: Interpolant, t: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the coefficients of (eta0, eta1, eta_z) in x and in every field of the path."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    mirror, latent = it.kind == "mirror", it.has_latent
    a = zero if mirror else it.alpha.value(t)
    da = zero if mirror else it.alpha.derivative(t)
    b, db = it.beta.value(t), it.beta.derivative(t)
    g, dg = (it.gamma.value(t), it.gamma.derivative(t)) if latent else (zero, zero)
    table = {"x": (a, b, g), "velocity": (da, db, dg), "v": (da, db, zero), "eta1": (zero, one, zero)}
    if not mirror:
        table["eta0"] = (one, zero, zero)
    if it.kind == "one-sided":
        table |= {"denoiser": (one, zero, zero), "score": (-1 / a, zero, zero)}
    elif latent:
        table |= {"denoiser": (zero, zero, one), "score": (zero, zero, -1 / g)}
    return table


def _solve(system: list[list[Tensor]], wanted: list[Tensor]) -> list[Tensor] | None:
    """Solve ``sum_k c_k system_k = wanted`` for the coefficients; None where they aren't determined."""
    matrix = torch.stack([torch.stack(row, -1) for row in system], -1).double()
    right = torch.stack(wanted, -1).double().unsqueeze(-1)
    # a field may be determined where others aren't: the encoder-decoder forgets one of its ends
    solution = torch.linalg.pinv(matrix, rtol=1e-11) @ right
    missed = (matrix @ solution - right).abs().amax()
    if not float(missed) <= 1e-8 * (1 + float(right.abs().amax())):
        return None
    return list(solution.squeeze(-1).to(wanted[0].dtype).unbind(-1))


def convert(
    interpolant: Interpolant, known: dict[str, Tensor], target: str, t: Tensor, x: Tensor, clip: float = 1e-3
) -> Tensor:
    """Return a field ``(..., d)`` from the values of the known ones.

    Args:
        interpolant: the path.
        known: one or two fields ``(..., d)`` by name.
        target: name of the field wanted.
        t: times that broadcast to ``x[..., :1]``.
        x: ``(..., d)`` points.
        clip: see :func:`conversion`.

    Raises:
        UnavailableError: if the known fields don't determine the target.

    Example:
        >>> it = Interpolant("one-sided-linear")
        >>> convert(it, {"velocity": torch.ones(1, 2)}, "eta1", torch.tensor(0.5), torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """
    at_points, at_fields = conversion(interpolant, list(known), target, t, clip)
    total = None if at_points is None else at_points * x
    for factor, value in zip(at_fields, known.values(), strict=True):
        if factor is not None:
            total = factor * value if total is None else total + factor * value
    assert total is not None
    return total
