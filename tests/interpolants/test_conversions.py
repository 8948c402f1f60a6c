"""Conversions: every field from every pair that determines it, against the exact mixture."""

from __future__ import annotations

import itertools

import pytest
import torch

from stochdyn import errors
from stochdyn.interpolants import Interpolant, conversion, convert
from stochdyn.interpolants.fields import check_known
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
                # single fields of two-sided paths, and what the encoder-decoder forgets on its way
                assert len(known) == 1 or path == "encoder-decoder", (known, target)
                continue
            found += 1
            assert float((value - values[target]).abs().max()) < 1e-10, (known, target)
    assert found >= {"one-sided": 100, "mirror": 60}.get(it.kind, 90)


@pytest.mark.parametrize(
    "known", [("velocity", "denoiser"), ("v", "denoiser"), ("velocity", "score"), ("v", "score")]
)
def test_drifts_stay_finite_at_the_ends(known: tuple[str, str]) -> None:
    ends = torch.tensor([0.0, 1.0])
    for target in ("velocity", "score", "denoiser"):
        at_points, at_fields = conversion(Interpolant(), known, target, ends)
        assert at_points is None
        for factor in at_fields:
            assert factor is None or bool(torch.isfinite(factor).all())


def test_velocity_from_v_and_score_is_exact_at_the_ends() -> None:
    """The product gamma gamma' is finite there though gamma' isn't."""
    _, (own, score) = conversion(Interpolant(scale=2.0), ("v", "score"), "velocity", torch.tensor([0.5]))
    assert own is not None
    assert score is not None
    assert (own.item(), score.item()) == (1.0, 0.0)


def test_fields_that_say_too_little_or_the_same() -> None:
    it = Interpolant()
    with pytest.raises(errors.UnavailableError, match="earn a second field"):
        conversion(it, ("velocity",), "score", torch.tensor(0.5))
    with pytest.raises(errors.InvalidInputError, match="determine one another"):
        check_known(it, ("score", "denoiser"))
    with pytest.raises(errors.InvalidInputError, match="one or two fields"):
        check_known(it, ())
    with pytest.raises(errors.InvalidInputError, match="one or two fields"):
        check_known(it, ("velocity", "score", "eta0"))
    with pytest.raises(errors.InvalidInputError, match="says nothing"):
        check_known(Interpolant("mirror"), ("v",))
    with pytest.raises(errors.InvalidInputError, match="without a latent has no score"):
        check_known(Interpolant("linear", "zero"), ("score",))
    with pytest.raises(errors.InvalidInputError, match="field is unknown"):
        check_known(it, ("drift",))
    bent = Interpolant(correction=lambda t, a, b: a)
    with pytest.raises(errors.InvalidInputError, match="isn't linear"):
        check_known(bent, ("eta1", "denoiser"))
