"""Bad input to the core: one row each, a typed error before any work that says what came and what should."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent, Normal

import stochdyn as sd
from stochdyn import _checks, errors

F64 = torch.float64
TS = torch.linspace(0, 1, 5)
ELSEWHERE = Independent(Normal(torch.zeros(2, device="meta"), 1.0, validate_args=False), 1)


class Untouched:
    """A drift that must not be reached."""

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        raise AssertionError("work was done before the input was checked")


def law(diffusion: Any = 1.0, initial: Any = None, drift: Any = None) -> sd.DiffusionMeasure:
    start = torch.zeros(2) if initial is None else initial
    return sd.DiffusionMeasure(start, sd.SDE(drift or (lambda t, x: -x), diffusion))


def path(size: int = 2, bad: float | None = None) -> sd.PathSample:
    x = torch.zeros(3, 5, size)
    if bad is not None:
        x[1, 2, 0] = bad
    return sd.PathSample(TS, x, torch.zeros(3, 4, size))


def observe(times: Any = (0.5,), values: Any = (0.0,), scale: Any = 1.0, ts: Any = TS) -> Any:
    return sd.GaussianObservations(ts, torch.tensor(times), torch.tensor(values), scale)


ROWS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unsorted times": (
        lambda: law(drift=Untouched()).sample(TS.flip(0)),
        errors.TimeGridError,
        r"ts\[1\]=0.75 after ts\[0\]=1",
    ),
    "repeated times": (
        lambda: law(drift=Untouched()).sample(torch.tensor([0.0, 0.5, 0.5])),
        errors.TimeGridError,
        "must increase strictly",
    ),
    "a single time": (
        lambda: law(drift=Untouched()).sample(TS[:1]),
        errors.TimeGridError,
        "at least 2 times; got 1",
    ),
    "a time without an axis": (
        lambda: law(drift=Untouched()).sample(TS[0]),
        errors.TimeGridError,
        "one axis",
    ),
    "words as times": (
        lambda: law(drift=Untouched()).sample(["now", "then"]),  # type: ignore[arg-type]
        errors.TimeGridError,
        "must be times",
    ),
    "NaN among the times": (
        lambda: law(drift=Untouched()).sample(torch.tensor([0.0, math.nan])),
        errors.NonFiniteError,
        r"ts\[1\]=nan",
    ),
    "NaN in the start": (
        lambda: law(initial=torch.tensor([0.0, math.nan])),
        errors.NonFiniteError,
        r"initial\[1\]",
    ),
    "NaN in a path": (
        lambda: law(drift=Untouched()).log_prob(path(bad=math.nan)),
        errors.NonFiniteError,
        r"path\.x\[1, 2, 0\]",
    ),
    "infinity in a path": (lambda: law().log_rn(path(bad=math.inf), law()), errors.NonFiniteError, "inf"),
    "a path of another size": (lambda: law().log_prob(path(3)), errors.ShapeError, "expected 2"),
    "a path of another length": (
        lambda: law().log_prob(sd.PathSample(TS[:4], torch.zeros(5, 2), torch.zeros(4, 2))),
        errors.ShapeError,
        "axis -2",
    ),
    "a path without axes": (
        lambda: law().log_prob(sd.PathSample(TS, torch.zeros(2), torch.zeros(2))),
        errors.ShapeError,
        "sample, T, d",
    ),
    "infinity in the data": (lambda: observe(values=[math.inf]), errors.NonFiniteError, r"values\[0\]=inf"),
    "times outside the grid": (lambda: observe(times=[1.5]), errors.TimeGridError, r"expected \[0, 1\]"),
    "no data": (lambda: observe([], []), errors.EmptyDataError, "values is empty"),
    "more times than data": (lambda: observe([0.5, 0.7]), errors.ShapeError, "2 and 1"),
    "a scale of zero": (lambda: observe(scale=0.0), errors.InvalidInputError, "scale must be positive"),
    "a negative scale of one datum": (
        lambda: observe([0.5, 0.7], [0.0, 0.0], torch.tensor([[1.0], [-1.0]])),
        errors.InvalidInputError,
        "minimum -1",
    ),
    "data of another size than the path": (
        lambda: observe(values=[[0.0, 0.0, 0.0]])(path()),
        errors.ShapeError,
        "expected 3",
    ),
    "data of another precision than the path": (
        lambda: sd.GaussianObservations(TS, TS[1:2], torch.zeros(1, 2, dtype=F64), 1.0)(path()),
        errors.DtypeMismatchError,
        r"path torch\.float32, values torch\.float64",
    ),
    "drift of another size": (
        lambda: law(drift=lambda t, x: x[..., [0, 1, 0]]).sample(TS),
        errors.ShapeError,
        "drift doesn't fit",
    ),
    "diffusion of another size": (
        lambda: law(torch.ones(3)).sample(TS),
        errors.ShapeError,
        r"expected \(\.\.\., 2\)",
    ),
    "matrix of another size": (
        lambda: law(torch.ones(3, 3)).sample(TS),
        errors.ShapeError,
        r"expected \(\.\.\., 2, m\)",
    ),
    "control of another size": (
        lambda: law().controlled(lambda t, z: z[..., [0, 1, 0]]).sample(TS),
        errors.ShapeError,
        r"expected \(\.\.\., 2\)",
    ),
    "grid and start on different devices": (
        lambda: law(initial=ELSEWHERE, drift=Untouched()).sample(TS),
        errors.DeviceMismatchError,
        r"ts on cpu, initial on meta",
    ),
    "drift on another device": (
        lambda: law(drift=lambda t, x: torch.zeros(2, device="meta")).sample(TS),
        errors.DeviceMismatchError,
        "drift on meta",
    ),
    "drift of another precision": (
        lambda: law(drift=lambda t, x: -x.double()).sample(TS),
        errors.DtypeMismatchError,
        r"state torch\.float32, drift torch\.float64",
    ),
    "drift network of another precision": (
        lambda: law(drift=lambda t, x: torch.nn.Linear(2, 2, dtype=F64)(x)).sample(TS),
        errors.DtypeMismatchError,
        r"drift doesn't take the state's precision torch\.float32",
    ),
    "diffusion of another precision": (
        lambda: law(torch.ones(2, dtype=F64)).sample(TS),
        errors.DtypeMismatchError,
        r"diffusion torch\.float64",
    ),
    "a diffusion of zero": (lambda: law(0.0), errors.DiffusionError, "must be positive; got minimum 0"),
    "a negative diffusion": (lambda: law(-0.5), errors.DiffusionError, "minimum -0.5"),
    "a negative component": (
        lambda: law(torch.tensor([1.0, -1.0])),
        errors.DiffusionError,
        r"\(d, m\) matrix",
    ),
    "a diffusion that isn't finite": (lambda: law(math.inf), errors.NonFiniteError, "diffusion"),
    "a diffusion that vanishes at the start": (
        lambda: law(lambda t, x: x).sample(TS),
        errors.DiffusionError,
        "must be positive",
    ),
    "differing diffusions": (
        lambda: law(1.0).kl(law(1.1), TS, 4),
        errors.DiffusionMismatchError,
        r"different diffusions.*0\.21 in G G\^T",
    ),
    "different fixed starts": (
        lambda: law().kl(law(initial=torch.ones(2)), TS, 4),
        errors.DiffusionMismatchError,
        "fixed starts",
    ),
    "a fixed and a random start": (
        lambda: law().kl(law(initial=Independent(Normal(torch.zeros(2), 1.0), 1)), TS, 4),
        errors.DiffusionMismatchError,
        "mutually singular",
    ),
    "density of a degenerate law": (
        lambda: law(torch.ones(2, 1)).log_prob(path()),
        errors.SingularDiffusionError,
        "2 x 1 matrix.*noise space",
    ),
    "density of a singular matrix": (
        lambda: law(torch.ones(2, 2)).log_prob(path()),
        errors.SingularDiffusionError,
        "smallest singular value",
    ),
    "a start without a vector event": (lambda: law(initial=Normal(0.0, 1.0)), errors.ShapeError, "to_event"),
    "a start that is a number": (
        lambda: law(initial=1.0),
        errors.InvalidInputError,
        "distribution or a tensor",
    ),
    "an integer start": (
        lambda: law(initial=torch.zeros(2, dtype=torch.int)),
        errors.InvalidInputError,
        "floating",
    ),
    "a drift that is a number": (lambda: sd.SDE(1.0, 1.0), errors.InvalidInputError, "callable"),  # type: ignore[arg-type]
    "noise that is a number": (lambda: sd.SDE(torch.sin, 1.0, 0.7), errors.InvalidInputError, "NoiseProcess"),  # type: ignore[arg-type]
    "an unknown method": (
        lambda: law().sample(TS, method="rk4"),
        errors.InvalidInputError,
        "'euler' | 'heun'",
    ),
    "an unknown estimator": (
        lambda: law().log_rn(path(), law(), "elbo"),
        errors.InvalidInputError,
        "'density' | 'rate'",
    ),
    "noise that doesn't commute": (
        lambda: law(lambda t, x: 2 + torch.sin(x).flip(-1)).sample(TS, method="milstein"),
        errors.InvalidInputError,
        "commutative",
    ),
    "a divergence from one path": (lambda: law().kl(law(), TS, 1), errors.InvalidInputError, "at least 2"),
    "no particles": (
        lambda: sd.PathELBO(law(), law(), observe(), 0),
        errors.InvalidInputError,
        "num_particles",
    ),
    "a bound without a grid": (
        lambda: sd.PathELBO(law(), law(), lambda path, batch: path.x),
        errors.InvalidInputError,
        "Give ts=",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row: str) -> None:
    call, error, message = ROWS[row]
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, errors.StochdynError)
    assert isinstance(caught.value, ValueError)


class _Clock:
    """Something with a coefficient of time."""

    @_checks.of_times
    def half(self, t: Tensor) -> Tensor:
        return 0.5 * t


def test_coefficients_of_time_refuse_what_is_no_time() -> None:
    clock = _Clock()
    assert clock.half(torch.tensor(3.0)) == 1.5
    assert torch.func.vmap(clock.half)(torch.ones(2)).tolist() == [0.5, 0.5]
    for bad, error in (
        (None, errors.ShapeError),
        ("x", errors.ShapeError),
        (math.nan, errors.NonFiniteError),
    ):
        with pytest.raises(error, match="t must"):
            clock.half(torch.tensor(bad) if isinstance(bad, float) else bad)  # type: ignore[arg-type]


def test_a_single_time_outside_a_grid_is_seen() -> None:
    # nonzero() of a tensor without axes has no elements, whatever it found
    with pytest.raises(errors.TimeGridError, match="inside"):
        _checks.check_inside(torch.tensor(-1.0), torch.tensor([0.0, 5.0]))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_covariance_is_judged_in_units_of_its_components(scale: float) -> None:
    cov = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=F64)
    unit = torch.tensor([scale, 1.0], dtype=F64)
    _checks.check_positive_definite(unit[:, None] * cov * unit, "cov")
    for bad in (cov - torch.eye(2, dtype=F64), cov + torch.tensor([[0.0, 0.1], [0.0, 0.0]], dtype=F64)):
        with pytest.raises(errors.InvalidInputError, match="cov must be symmetric"):
            _checks.check_positive_definite(unit[:, None] * bad * unit, "cov")


def test_a_word_is_no_sequence_of_names() -> None:
    assert _checks.as_sequence(("a", "b"), "names", "names") == ["a", "b"]
    for bad in ("ab", 3, None, torch.tensor(1.0)):
        with pytest.raises(errors.InvalidInputError, match="names must be"):
            _checks.as_sequence(bad, "names", "names")


MASKED = {
    "evidence": lambda m: sd.LinearGaussianMeasure.ornstein_uhlenbeck(1.0).log_evidence(
        [1.0, 2.0], [[0.1], [0.2]], 0.1, mask=m
    ),
    "observe": lambda m: poutine.trace(
        lambda: sd.infer.observe("y", dist.Normal(0.0, torch.ones(2)), torch.zeros(2), m)
    ).get_trace(),
    "rates": lambda m: sd.jumps.RateMatrix(
        [[0.0, 1.0], [0.0, 0.0]], mask=[[0, 1], [1, 0]] if m is None else [m, m]
    ),
    "panel": lambda m: sd.jumps.fit_rates(
        sd.jumps.PanelData({"i": [1] * 4, "t": [0.0, 1.0, 2.0, 3.0], "s": [0, 1, 0, 1]}, "i", "t", "s"),
        mask=None if m is None else [m, m],
        num_draws=0,
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_read_alike_everywhere(name: str) -> None:
    for mask in ([True, True], [1, 1], np.array([1, 1], dtype="int8"), (True, True)):
        MASKED[name](mask)
    for bad in ([2, 1], [-1, 1], [0.5, 1.0], [float("nan"), 1.0], ["yes", "no"], [None, True]):
        with pytest.raises(errors.ShapeError, match="mask must be a boolean"):
            MASKED[name](bad)


def test_tables_keep_their_precision_as_arrays_do() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1e9, 1e9 + 1], "b": [0.1, 0.2]})
    for table in (frame, frame.astype("Float64"), frame.assign(b=[1, 2])):
        value = _checks.as_tensor(table, "x")
        assert value.dtype == F64
        assert float(value[1, 0] - value[0, 0]) == 1.0
    assert _checks.as_tensor(frame.astype("float32"), "x").dtype == torch.float32
    assert _checks.as_tensor(frame, "x", like=torch.zeros(())).dtype == torch.float32
