"""Conversions: every field from every pair that determines it, against the exact mixture."""

from __future__ import annotations

import itertools

import pytest
import torch

from stochdyn import errors
from stochdyn.interpolants import Interpolant, conversion, convert
from stochdyn.interpolants.fields import check_known, regular_at
from tests.interpolants.truths import ALL_PATHS, F64, fields_of, truth


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("path", ALL_PATHS)
def test_every_field_follows_from_every_pair(path: str, dim: int) -> None:
    flow = truth(path, dim)
    it, names = flow.interpolant, fields_of(flow)
    t = torch.tensor([0.2, 0.7], dtype=F64)[:, None, None]
    x = flow.sample(t[:, 0, 0], 4, torch.Generator().manual_seed(2))
    values = {n: getattr(flow, n)(t, x) for n in names}
    found = 0
    for known in [*((n,) for n in names), *itertools.permutations(names, 2)]:
        try:
            check_known(it, known)
        except errors.InvalidInputError:
            continue
        for target in names:
            try:
                value = convert(it, {k: values[k] for k in known}, target, t, x)
            except errors.UnavailableError:
                # single fields of two-sided paths; velocities at whose middle the rate of the latent vanishes; and what the
                # encoder-decoder forgets on its way
                flat = set(known) == {"velocity", "path_velocity"} or (
                    it.kind == "mirror" and "velocity" in (*known, "velocity")
                )
                assert len(known) == 1 or flat or path == "encoder-decoder", (known, target)
                continue
            found += 1
            assert float((value - values[target]).abs().max()) < 1e-10, (known, target)
    assert found >= {"one-sided": 100, "mirror": 40}.get(it.kind, 80)


@pytest.mark.parametrize(
    "known",
    [
        ("velocity", "noise_prediction"),
        ("path_velocity", "noise_prediction"),
        ("velocity", "score"),
        ("path_velocity", "score"),
    ],
)
def test_what_is_known_at_an_end_is_finite_there(known: tuple[str, str]) -> None:
    for target in ("velocity", "score", "noise_prediction"):
        for end in (0, 1):
            at_points, at_fields = conversion(Interpolant(), known, target, torch.tensor(float(end)))
            assert at_points is None
            finite = all(f is None or bool(torch.isfinite(f)) for f in at_fields)
            assert finite or not regular_at(Interpolant(), known, target, end)
    assert regular_at(Interpolant(), known, "velocity", 0) == (known[0] == "velocity")


def test_conversions_wait_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times on the meta device have no values: a conversion that looked at one would fail."""
    it = Interpolant()
    for known in (
        ("velocity", "noise_prediction"),
        ("start_prediction", "data_prediction"),
        ("velocity", "data_prediction"),
    ):
        conversion(it, known, "score", torch.tensor(0.5))
        at_points, at_fields = conversion(it, known, "score", torch.empty(3, 1, device="meta"))
        assert all(part is None or part.shape == (3, 1) for part in (at_points, *at_fields))


def test_velocity_from_v_and_score_is_exact_at_the_ends() -> None:
    """The product gamma gamma' is finite there though gamma' isn't."""
    _, (own, score) = conversion(
        Interpolant(scale=2.0), ("path_velocity", "score"), "velocity", torch.tensor([0.5])
    )
    assert own is not None
    assert score is not None
    assert (own.item(), score.item()) == (1.0, 0.0)


def test_fields_that_say_too_little_or_the_same() -> None:
    it = Interpolant()
    with pytest.raises(errors.UnavailableError, match="earn a second field"):
        conversion(it, ("velocity",), "score", torch.tensor(0.5))
    with pytest.raises(errors.InvalidInputError, match="determine one another"):
        check_known(it, ("score", "noise_prediction"))
    with pytest.raises(errors.InvalidInputError, match="one or two fields"):
        check_known(it, ())
    with pytest.raises(errors.InvalidInputError, match="one or two fields"):
        check_known(it, ("velocity", "score", "start_prediction"))
    with pytest.raises(errors.InvalidInputError, match="says nothing"):
        check_known(Interpolant("mirror"), ("path_velocity",))
    with pytest.raises(errors.InvalidInputError, match="without a latent has no score"):
        check_known(Interpolant("linear", "zero"), ("score",))
    with pytest.raises(errors.InvalidInputError, match="field is unknown"):
        check_known(it, ("drift",))
    bent = Interpolant(correction=lambda t, a, b: a)
    with pytest.raises(errors.InvalidInputError, match="isn't linear"):
        check_known(bent, ("data_prediction", "noise_prediction"))
