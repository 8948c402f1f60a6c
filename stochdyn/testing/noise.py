"""What every driving noise must satisfy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stochdyn.core.sde.noise import NoiseProcess, NoiseSteps

__all__ = ["NoiseProcessSuite"]


class NoiseProcessSuite(ABC):
    """Tests of a :class:`stochdyn.NoiseProcess` without batched parameters; implement :meth:`make`.

    Attributes:
        grid: An irregular grid on which the process is used.
        variance_tolerance: The relative tolerance of :meth:`variance`, where that is known.
    """

    grid: tuple[float, ...] = (0.0, 0.1, 0.15, 0.4, 0.75, 1.0)
    variance_tolerance: float = 1e-8

    @abstractmethod
    def make(self) -> NoiseProcess:
        """Return a noise process."""

    def variance(self, ts: Tensor) -> Tensor | None:
        """Return the exact variances ``(T,)`` of one channel of Z at ``ts``, or None if they aren't known."""
        return None

    def _steps(self, dtype: torch.dtype = torch.float64) -> tuple[NoiseProcess, Tensor, NoiseSteps]:
        noise, ts = self.make(), torch.tensor(self.grid, dtype=torch.float64)
        return noise, ts, noise.steps(ts, dtype=dtype)

    def test_shapes_fit_the_recursion(self) -> None:
        """All coefficients have ``N`` steps, ``R`` innovations and ``K`` states."""
        noise, ts, steps = self._steps()
        n, k, r = ts.shape[0] - 1, noise.num_states, noise.num_innovations(ts)
        assert steps.variance.shape == (n, r)
        assert steps.gain.shape == (n, r)
        assert steps.recall.shape == (n, k)
        assert steps.decay.shape == (n, k)
        assert steps.load.shape == (n, r, k)

    def test_first_innovation_is_the_brownian_increment(self) -> None:
        """Its variance is the step, whatever the process."""
        _, ts, steps = self._steps()
        torch.testing.assert_close(steps.variance[:, 0], ts[1:] - ts[:-1])

    def test_coefficients_are_finite_and_stable(self) -> None:
        """Variances aren't negative and memory doesn't grow."""
        _, _, steps = self._steps()
        for part in (steps.variance, steps.gain, steps.recall, steps.decay, steps.load):
            assert bool(torch.isfinite(part).all())
        assert bool((steps.variance >= 0).all())
        assert bool((steps.decay.abs() <= 1).all())

    def test_precision_follows_the_argument(self) -> None:
        """Single precision in, single precision out, with the values of double precision."""
        _, _, single = self._steps(torch.float32)
        _, _, double = self._steps()
        for name in ("variance", "gain", "recall", "decay", "load"):
            low, high = getattr(single, name), getattr(double, name)
            assert low.dtype == torch.float32
            torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-5)

    def test_initial_factor_fits_the_states(self) -> None:
        """``initial_factor`` is None or ``(Q, K)``."""
        noise, _, _ = self._steps()
        factor = noise.initial_factor(dtype=torch.float64, device=torch.device("cpu"))
        assert factor is None or (factor.ndim == 2 and factor.shape[1] == noise.num_states)

    def test_a_step_depends_on_its_ends_alone(self) -> None:
        """The first steps of a longer grid are those of the shorter one."""
        noise, ts, steps = self._steps()
        short = noise.steps(ts[:3], dtype=torch.float64)
        if short.variance.shape[1] == steps.variance.shape[1]:
            for name in ("variance", "gain", "recall", "decay", "load"):
                torch.testing.assert_close(getattr(short, name), getattr(steps, name)[:2])

    def test_variance_of_the_recursion(self) -> None:
        """The recursion gives the exact variances of Z, where they are known."""
        noise, ts, steps = self._steps()
        truth = self.variance(ts)
        if truth is None:
            return
        torch.testing.assert_close(
            recursion_variance(noise, steps), truth, rtol=self.variance_tolerance, atol=1e-12
        )


def recursion_variance(noise: NoiseProcess, steps: NoiseSteps) -> Tensor:
    """Return the variances ``(T,)`` of one channel of Z that the recursion implies."""
    k = noise.num_states
    like = steps.variance
    cov = like.new_zeros(k + 1, k + 1)
    factor = noise.initial_factor(dtype=like.dtype, device=like.device)
    if factor is not None:
        cov[1:, 1:] = factor.mT @ factor
    out = [cov[0, 0]]
    for n in range(like.shape[0]):
        move = torch.diag(torch.cat([like.new_ones(1), steps.decay[n]]))
        move[0, 1:] = steps.recall[n]
        entry = torch.cat([steps.gain[n][:, None], steps.load[n]], 1)
        cov = move @ cov @ move.mT + entry.mT @ (like[n][:, None] * entry)
        out.append(cov[0, 0])
    return torch.stack(out)
