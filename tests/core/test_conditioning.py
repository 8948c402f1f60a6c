"""Laws weighted by a Gaussian potential of their end, against conditioning on data and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import LinearGaussianMeasure, PathSample, PinnedProcess
from stochdyn.core.gaussian import EndPotential, TiltedMeasure, absorb
from stochdyn.errors import SingularDiffusionError, TimeGridError

F64 = torch.float64
TS = torch.linspace(0.2, 1.7, 6, dtype=F64)
END = torch.tensor([0.3, 0.2], dtype=F64)


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _oscillator(cov: Tensor | None = None) -> LinearGaussianMeasure:
    """A damped oscillator whose noise enters one component only."""
    matrix, noise = (
        torch.tensor([[0.0, 1.0], [-2.0, -0.5]], dtype=F64),
        torch.tensor([[0.0], [0.8]], dtype=F64),
    )
    return LinearGaussianMeasure(matrix, _t(0.2, 0.1), noise, _t(1.0, -1.0), cov, initial_time=0.2)


def _tilted(potential: EndPotential, law: LinearGaussianMeasure) -> TiltedMeasure:
    return TiltedMeasure(law, 1.5, potential, law.initial_mean, law.initial_cov)


def test_a_pinned_end_is_an_exact_observation_of_it() -> None:
    law = _oscillator()
    tilted, given = _tilted(EndPotential.pinned(END), law), law.conditioned(_t(1.7), END[None], 0.0)
    for verb in ("mean", "covariance", "joint_covariance"):
        torch.testing.assert_close(getattr(tilted, verb)(TS), getattr(given, verb)(TS))
    mean, cov = tilted.moments_at(TS.flip(0))
    torch.testing.assert_close(mean.flip(0), given.mean(TS))
    torch.testing.assert_close(cov.flip(0), given.covariance(TS))
    path = given.sample(TS[:-1], 3, 0)
    torch.testing.assert_close(tilted.log_prob(path), given.log_prob(path))
    torch.testing.assert_close(tilted.drift(0.7, path.x[:, 2]), given.drift(0.7, path.x[:, 2]))


def test_a_soft_end_multiplies_its_law() -> None:
    law = _oscillator(0.3 * torch.eye(2, dtype=F64))
    precision, linear = torch.tensor([[2.0, 0.3], [0.3, 0.1]], dtype=F64), _t(1.0, -0.5)
    given = law.conditioned(
        _t(1.7), torch.linalg.solve(precision, linear)[None], 0.0, torch.eye(2, dtype=F64)
    )
    mean, cov = absorb(law.mean(TS)[-1], law.covariance(TS)[-1], precision, linear)
    # The start that the weighted law has: the prior's, weighted by the potential as it is seen from there.
    potential = EndPotential.information(precision, linear)
    whole = tuple(x[0] for x in law.transition(TS[:1], TS[-1:]))
    start = absorb(law.initial_mean, law.initial_cov, *potential.before(whole))  # type: ignore[arg-type]
    tilted = TiltedMeasure(law, 1.5, potential, *start)
    torch.testing.assert_close(tilted.mean(TS)[-1], mean)
    torch.testing.assert_close(tilted.covariance(TS)[-1], cov)
    assert not torch.allclose(given.mean(TS), tilted.mean(TS))


def test_many_ends_at_once_are_brownian_bridges() -> None:
    ends = torch.tensor([[1.0, 0.0], [-2.0, 3.0], [0.5, 0.5]], dtype=F64)
    walk = LinearGaussianMeasure.brownian(2, initial_mean=_t(0.0, 1.0))
    many = TiltedMeasure(walk, 2.0, EndPotential.pinned(ends), walk.initial_mean, walk.initial_cov)
    exact = PinnedProcess(_t(0.0, 1.0), ends, end_time=2.0)
    assert many.batch_shape == (3,)
    torch.testing.assert_close(many.mean(TS), exact.mean(TS))
    torch.testing.assert_close(many.covariance(TS), exact.covariance(TS).expand(3, -1, -1, -1))
    path = exact.sample(TS, 4, 0)
    torch.testing.assert_close(many.log_prob(path), exact.log_prob(path))
    torch.testing.assert_close(many.drift(1.0, path.x[..., 3, :]), exact.drift(1.0, path.x[..., 3, :]))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_of_time_and_of_each_component_change_nothing(unit: float) -> None:
    law, length = _oscillator(), _t(1.0, 1e6)
    plain = _tilted(EndPotential.pinned(END), law)
    scale = torch.diag(length)
    other = LinearGaussianMeasure(
        scale @ law.drift_matrix.constant @ torch.diag(1 / length) / unit,
        length * law.drift_offset.constant / unit,
        scale @ law.diffusion.constant / unit**0.5,
        length * law.initial_mean,
        initial_time=0.2 * unit,
    )
    converted = TiltedMeasure(
        other, 1.5 * unit, EndPotential.pinned(length * END), other.initial_mean, other.initial_cov
    )
    torch.testing.assert_close(converted.mean(TS * unit) / length, plain.mean(TS), rtol=1e-7, atol=1e-9)
    got = converted.covariance(TS * unit) / length[:, None] / length
    torch.testing.assert_close(got, plain.covariance(TS), rtol=1e-7, atol=1e-9)
    x = other.sample(TS * unit, 5, 0).x
    path, there = PathSample.of_states(TS, x / length), PathSample.of_states(TS * unit, x)
    shift = 4 * length.log().sum()  # four of six points are part of the event
    torch.testing.assert_close(converted.log_prob(there) + shift, plain.log_prob(path), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_reached_or_lies_outside_is_refused() -> None:
    still = LinearGaussianMeasure(
        torch.zeros(2, 2, dtype=F64), _t(0.0, 0.0), torch.tensor([[0.0], [1.0]], dtype=F64), _t(0.0, 0.0)
    )
    with pytest.raises(SingularDiffusionError, match="reach"):
        TiltedMeasure(still, 1.0, EndPotential.pinned(END), still.initial_mean, still.initial_cov)
    tilted = _tilted(EndPotential.pinned(END), _oscillator())
    with pytest.raises(TimeGridError, match="inside the bridge"):
        tilted.mean(_t(0.5, 2.0))
