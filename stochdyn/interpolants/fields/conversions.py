r"""Conversions between what networks learn: velocity, its smooth part, score, noise and the two ends.

All are linear combinations of the three conditional means :math:`(\eta_0,\eta_1,\eta_z)` of the start, the data and the
noise, which obey :math:`\alpha\eta_0+\beta\eta_1+\gamma\eta_z=x`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn._checks import (
    check_choice,
    check_points,
    check_real,
    check_time_broadcast,
    check_type,
)
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.interpolants.paths.interpolant import TARGETS, Interpolant

__all__ = ["anchors", "check_known", "conversion", "convert", "determines", "regular_at"]

#: The conditional means of the ends and of the latent, by position.
_START, _DATA, _LATENT = 0, 1, 2
_FLOWS = ("velocity", "path_velocity")


def check_known(interpolant: Interpolant, known: Sequence[str]) -> None:
    """Raise unless fields of these names belong to the path and don't repeat one another.

    Raises:
        InvalidInputError: If there is none, or more than two; if two of them say the same; or if the path has no such
            field.
    """
    if not 1 <= len(known) <= 2:
        raise InvalidInputError(
            "give one or two fields to learn", got=list(known) or "none", expected=list(TARGETS)
        )
    one_sided, mirror = interpolant.kind == "one-sided", interpolant.kind == "mirror"
    for name in known:
        check_choice(name, TARGETS, "field")
        if name in ("score", "noise_prediction") and not one_sided and not interpolant.has_latent:
            raise InvalidInputError(
                f"a path without a latent has no {name}", got="gamma = 0", hint="give the interpolant a gamma"
            )
        if name in ("start_prediction", "path_velocity") and mirror:
            raise InvalidInputError(
                f"on a mirror path {name} says nothing", got=name, hint="learn the noise_prediction"
            )
        if name in ("start_prediction", "data_prediction") and interpolant.correction is not None:
            raise InvalidInputError(
                f"a path with a correction isn't linear, so {name} gives no velocity", got=name
            )
    same = [{"score", "noise_prediction"}]
    if one_sided:
        same += [{"noise_prediction", "start_prediction"}, {"score", "start_prediction"}]
    if one_sided or not interpolant.has_latent:
        same += [set(_FLOWS)]
    if len(known) == 2 and (len(set(known)) == 1 or set(known) in same):
        raise InvalidInputError("two fields that determine one another add nothing", got=" and ".join(known))


class _Path:
    """The coefficients of a path at given times: every field as a row of factors of (start, data, noise)."""

    def __init__(self, it: Interpolant, t: Tensor) -> None:
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        mirror, self.one_sided = it.kind == "mirror", it.kind == "one-sided"
        # x_t = alpha x0 + beta x1 + gamma z: its rows and those of its derivatives, as factors of the three means
        a, da = (zero, zero) if mirror else (it.alpha.value(t), it.alpha.derivative(t))
        b, db = it.beta.value(t), it.beta.derivative(t)
        g, dg = (it.gamma.value(t), it.gamma.derivative(t)) if it.has_latent else (zero, zero)
        self.noise = _START if self.one_sided else _LATENT
        self.rows = {
            "x": [a, b, g],
            "velocity": [da, db, dg],
            "path_velocity": [da, db, zero],
            "data_prediction": [zero, one, zero],
            "start_prediction": [one, zero, zero],
        }
        # the rows' factor of the noise, times the noise's own schedule: finite where the factor isn't
        level = a if self.one_sided else g
        squared = (
            0.5 * (it.alpha if self.one_sided else it.gamma).square_derivative(t)
            if not mirror or it.has_latent
            else zero
        )
        unit = [one if i == self.noise else zero for i in range(3)]
        self.rows["noise_prediction"] = unit
        self.rows["score"] = [-u / level if i == self.noise else u for i, u in enumerate(unit)]
        has_rate = {"velocity"} | ({"path_velocity"} if self.one_sided else set())
        self.scaled = {
            name: squared if name in has_rate else -one if name == "score" else row[self.noise] * level
            for name, row in self.rows.items()
        }
        self.scaled["x"] = it.alpha.square(t) if self.one_sided else it.gamma.square(t)
        if self.one_sided:
            self.unknowns = {_START, _DATA}
        elif mirror:
            self.unknowns = {_DATA, _LATENT}
        else:
            self.unknowns = {_START, _DATA, _LATENT} if it.has_latent else {_START, _DATA}

    def means(self, known: Sequence[str]) -> dict[int, int]:
        """Return which conditional means are known as they are: position of the mean to position of the field."""
        places = {
            "start_prediction": _START,
            "data_prediction": _DATA,
            "noise_prediction": self.noise,
            "score": self.noise,
        }
        return {places[name]: k for k, name in enumerate(known) if name in places}


def conversion(
    interpolant: Interpolant, known: Sequence[str], target: str, t: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    r"""Return the coefficients of a field in terms of the known ones.

    .. math:: f = c_x\,x+\sum_kc_k\,f_k

    At an end of [0, 1] a coefficient may be infinite, although the field itself is finite there: see :func:`regular_at`.

    Args:
        interpolant: The path.
        known: The names of one or two fields.
        target: The name of the field that is wanted.
        t: The times of any shape.

    Returns:
        ``c_x`` and the list of ``c_k``, each of the shape of ``t``, or None for zero.

    Raises:
        UnavailableError: If the known fields don't determine the target.

    Example:
        >>> it = Interpolant("one-sided-linear")
        >>> conversion(it, ["velocity"], "data_prediction", torch.tensor(0.25))
        (tensor(1.), [tensor(0.7500)])
    """
    check_type(interpolant, Interpolant, "interpolant")
    check_points(t, "t", "times of any shape")
    if isinstance(known, str) or not isinstance(known, Sequence):
        raise InvalidInputError("known must be names of fields", got=repr(known)[:60], expected=list(TARGETS))
    check_known(interpolant, known)
    check_choice(target, TARGETS, "target")
    if not determines(interpolant, known, target):
        raise UnavailableError(
            f"{' and '.join(known)} don't determine the {target} at every time of this path",
            hint="learn a second field, such as the noise_prediction beside the velocity",
        )
    return _coefficients(interpolant, known, target, t)


def _coefficients(
    it: Interpolant, known: Sequence[str], target: str, t: Tensor
) -> tuple[Tensor | None, list[Tensor | None]]:
    factors: list[Tensor | None] = [None] * len(known)
    if target in known:
        factors[list(known).index(target)] = torch.ones_like(t)
        return None, factors
    path = _Path(it, t)
    row, means = path.rows[target], path.means(known)
    flow = next((name for name in known if name in _FLOWS), None)
    same_flow = target in _FLOWS and flow is not None
    if same_flow and (path.one_sided or not it.has_latent):
        factors[list(known).index(flow)] = torch.ones_like(t)  # type: ignore[arg-type]
        return None, factors
    noises = ("score", "noise_prediction", *(("start_prediction",) if path.one_sided else ()))
    if target in noises and path.noise in means:
        # a multiple of the noise alone
        k = means[path.noise]
        factors[k] = row[path.noise] if known[k] != "score" else -path.scaled[target]
        return None, factors
    missing = sorted(path.unknowns - set(means))
    if it.has_latent and same_flow and path.noise in means:
        # b = v + gamma' eta_z, where -gamma gamma' s is finite although gamma' isn't
        k, sign = means[path.noise], 1.0 if target == "velocity" else -1.0
        factors[list(known).index(flow)] = torch.ones_like(t)  # type: ignore[arg-type]
        rate = path.rows["velocity"][_LATENT]
        factors[k] = sign * (rate if known[k] != "score" else -path.scaled["velocity"])
        return None, factors
    # the point itself is the first equation for the means that are missing, a known flow the second
    at_point = at_flow = None
    if len(missing) == 2:
        assert flow is not None
        at_point, at_flow = _solve_two([path.rows["x"], path.rows[flow]], row, missing)
    elif len(missing) == 1:
        at_point = _ratio(row[missing[0]], path.rows["x"][missing[0]])
    for mean, k in means.items():
        score = known[k] == "score"

        def part(name: str, mean: int = mean, score: bool = score) -> Tensor:
            return -path.scaled[name] if score else path.rows[name][mean]

        factor = part(target)
        if at_point is not None:
            factor = factor - at_point * part("x")
        if at_flow is not None:
            factor = factor - at_flow * part(flow)  # type: ignore[arg-type]
        factors[k] = factor
    if at_flow is not None:
        factors[list(known).index(flow)] = at_flow  # type: ignore[arg-type]
    return at_point, factors


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide; nothing over nothing is nothing: a mean that is in neither isn't asked for."""
    nothing = (above == 0) & (below == 0)
    return torch.where(nothing, 0.0, above / torch.where(nothing, 1.0, below))


def _solve_two(
    equations: list[list[Tensor]], wanted: list[Tensor], places: list[int]
) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`c_1(A,B)+c_2(C,D)=(P,Q)`; where one mean is in none of the three, for the other one alone."""
    (a, b), (c, d) = ([row[i] for i in places] for row in equations)
    p, q = (wanted[i] for i in places)
    # Cramer's rule, or the least-squares solution in one unknown where the other mean has no factor at all
    determinant = a * d - b * c
    without_first, without_second = (a == 0) & (c == 0) & (p == 0), (b == 0) & (d == 0) & (q == 0)
    alone = without_first | without_second
    safe = torch.where(alone, 1.0, determinant)
    e, f, r = (torch.where(without_first, y, x) for x, y in ((a, b), (c, d), (p, q)))
    norm = torch.where(alone, e.square() + f.square(), 1.0)
    first = torch.where(alone, _ratio(r * e, norm), (p * d - q * c) / safe)
    second = torch.where(alone, _ratio(r * f, norm), (q * a - p * b) / safe)
    return first, second


def determines(interpolant: Interpolant, known: Sequence[str], target: str) -> bool:
    """Return whether fields of the names ``known`` determine the ``target`` inside [0, 1].

    Example:
        >>> determines(Interpolant("linear"), ["velocity"], "score")
        False
    """
    return _facts(interpolant, tuple(known), target)[0]


def regular_at(interpolant: Interpolant, known: Sequence[str], target: str, end: int) -> bool:
    """Return whether a field can be evaluated at time 0 or 1 itself, and not only near it.

    It can't where a coefficient is infinite, or where a score or noise is asked whose noise vanishes there.

    Example:
        >>> it = Interpolant("one-sided-linear")
        >>> [regular_at(it, ["data_prediction"], "velocity", end) for end in (0, 1)]
        [True, False]
    """
    return _facts(interpolant, tuple(known), target)[1 + end]


def anchors(interpolant: Interpolant, known: Sequence[str], name: str) -> tuple[int, ...]:
    """Return the ends at which a known field has a known value, and the velocity is it over the distance from that end.

    There an error of the field makes an error of the velocity that isn't integrable, while what it must be is known: the data
    prediction at time 1 and the start prediction at time 0 are the point itself.

    Example:
        >>> anchors(Interpolant("one-sided-linear"), ["data_prediction"], "data_prediction")
        (1,)
    """
    key = ("anchors", tuple(known), name)
    if key not in interpolant.facts:
        interpolant.facts[key] = tuple(
            end
            for end in (0, 1)
            if _has_limit(interpolant, name, end) and _grows(interpolant, tuple(known), name, end)
        )
    return interpolant.facts[key]


def _has_limit(it: Interpolant, name: str, end: int) -> bool:
    if name == "data_prediction":
        return end == 1 or it.kind == "mirror"
    if name == "start_prediction":
        return end == 0
    return it.kind == "one-sided" and name in ("noise_prediction", "score") and end == 0


def _grows(it: Interpolant, known: tuple[str, ...], name: str, end: int) -> bool:
    """Return whether the factor of a field in the velocity grows like the inverse distance from an end."""
    if not determines(it, known, "velocity") or "velocity" in known:
        return False
    near = torch.tensor([1e-4, 1e-6], dtype=torch.float64)
    factor = _coefficients(it, known, "velocity", near if end == 0 else 1 - near)[1][known.index(name)]
    return factor is not None and bool(((factor * near).abs() > 1e-2).all())


def _facts(it: Interpolant, known: tuple[str, ...], target: str) -> tuple[bool, bool, bool]:
    """Return whether the target is determined, and whether it is regular at either end; looked up once."""
    if (known, target) not in it.facts:
        it.facts[known, target] = _find_facts(it, known, target)
    return it.facts[known, target]  # type: ignore[return-value]


def _find_facts(it: Interpolant, known: tuple[str, ...], target: str) -> tuple[bool, bool, bool]:
    inside = torch.linspace(0, 1, 41, dtype=torch.float64)[1:-1]
    path = _Path(it, inside)
    missing = path.unknowns - set(path.means(known))
    flows = [name for name in known if name in _FLOWS]
    latent_known = path.noise in path.means(known)
    if target in known:
        enough = True
    elif it.correction is not None or (
        it.kind == "mirror" and target in ("start_prediction", "path_velocity")
    ):
        # off the straight path only the noise converts flows and scores into one another
        enough = it.correction is not None and (
            (target in _FLOWS and bool(flows) and (latent_known or not it.has_latent))
            or (target in ("score", "noise_prediction") and latent_known)
        )
    elif target in ("score", "noise_prediction") and it.kind != "one-sided" and not it.has_latent:
        enough = False
    else:
        easy = (
            target in _FLOWS and bool(flows) and (latent_known or it.kind == "one-sided" or not it.has_latent)
        ) or (target in ("score", "noise_prediction") and latent_known)
        enough = easy or len(missing) <= (2 if flows else 1)
    if not enough:
        return False, False, False
    with torch.no_grad():
        if not all(_finite(part) for part in _flatten(_coefficients(it, known, target, inside))):
            return False, False, False
        ends = [_regular(it, known, target, end) for end in (0.0, 1.0)]
    return True, ends[0], ends[1]


def _regular(it: Interpolant, known: tuple[str, ...], target: str, end: float) -> bool:
    t = torch.tensor(end, dtype=torch.float64)
    at_point, factors = _coefficients(it, known, target, t)
    vanishes = bool(it.noise.value(t).abs() < 1e-12)
    noisy = any(
        f is not None and name in ("score", "noise_prediction")
        for name, f in zip(known, factors, strict=True)
    )
    return not (vanishes and noisy) and all(_finite(part) for part in _flatten((at_point, factors)))


def _flatten(parts: tuple[Tensor | None, list[Tensor | None]]) -> list[Tensor]:
    return [part for part in (parts[0], *parts[1]) if part is not None]


def _finite(part: Tensor) -> bool:
    return bool(torch.isfinite(part).all())


def convert(
    interpolant: Interpolant,
    known: dict[str, Tensor],
    target: str,
    t: Tensor,
    x: Tensor,
    clip: float = 1e-3,
) -> Tensor:
    """Return a field ``(..., d)`` from the values of the known ones at a time.

    Args:
        interpolant: The path.
        known: The values of one or two fields, ``(..., d)``, by name.
        target: The name of the field that is wanted.
        t: The times that broadcast to ``x[..., :1]``. Times nearer than ``clip`` to an end are moved to that distance; the
            known fields should then be those of the moved times.
        x: The points, ``(..., d)``.
        clip: The least distance of a time from 0 and 1, between 0 and one half.

    Raises:
        UnavailableError: If the known fields don't determine the target.

    Example:
        >>> it = Interpolant("one-sided-linear")
        >>> convert(it, {"velocity": torch.ones(1, 2)}, "data_prediction", torch.tensor(0.5), torch.zeros(1, 2))
        tensor([[0.5000, 0.5000]])
    """
    check_real(clip, "clip", minimum=0.0, below=0.5)
    check_type(known, dict, "known", "values of fields by name")
    for name, value in {"t": t, "x": x, **known}.items():
        check_points(value, str(name))
    check_time_broadcast(t, x)
    for name, value in known.items():
        if value.shape != x.shape or not value.is_floating_point():
            raise ShapeError(
                f"{name} must have the shape of x", got=tuple(value.shape), expected=tuple(x.shape)
            )
    at_points, at_fields = conversion(interpolant, list(known), target, t.clamp(clip, 1 - clip))
    total = None if at_points is None else at_points * x
    for factor, value in zip(at_fields, known.values(), strict=True):
        if factor is not None:
            total = factor * value if total is None else total + factor * value
    assert total is not None
    return total
