"""What every marginal flow must satisfy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stochdyn.core.forward.flow import MarginalFlow
from stochdyn.errors import ShapeError

__all__ = ["MarginalFlowSuite"]


class MarginalFlowSuite(ABC):
    """Tests of a :class:`stochdyn.MarginalFlow`; subclasses implement :meth:`make`.

    Samples and density are held against each other by identities that need no third party. Monte Carlo bounds
    are five standard errors wide, so a right flow fails one of them less than once in a hundred thousand
    runs.

    Attributes:
        times: The two times at which the flow has a density.
        num_samples: The number of points the Monte Carlo identities use.
        dtype: The precision of the times.
        normalised: Whether the density integrates to one.
    """

    times: tuple[float, float] = (0.3, 0.8)
    num_samples: int = 4000
    dtype: torch.dtype = torch.float64
    normalised: bool = True

    @abstractmethod
    def make(self) -> MarginalFlow:
        """Return a flow with a density and a sampler, in precision ``dtype``."""

    def _draw(self, flow: MarginalFlow, n: int) -> tuple[Tensor, Tensor]:
        t = torch.tensor(self.times, dtype=self.dtype)
        with torch.no_grad():
            return t[:, None, None], flow.sample(t, n, torch.Generator().manual_seed(5))

    def test_shapes_of_samples(self) -> None:
        """A number gives ``(n, d)``, times ``(T,)`` give ``(T, n, d)``."""
        flow = self.make()
        x = flow.sample(self.times[0], 3)
        assert x.ndim == 2
        assert x.shape[0] == 3
        t = torch.tensor(self.times, dtype=self.dtype)
        assert flow.sample(t, 3).shape == (2, 3, x.shape[-1])

    def test_generator_decides_the_samples(self) -> None:
        """Two generators in the same state give the same samples, and the global state stays untouched."""
        flow, before = self.make(), torch.get_rng_state()
        draws = [flow.sample(self.times[0], 4, torch.Generator().manual_seed(9)) for _ in range(2)]
        assert torch.equal(draws[0], draws[1])
        assert torch.equal(before, torch.get_rng_state())

    def test_times_may_be_shared_leading_or_one_per_point(self) -> None:
        """The three ways to give times agree in density and score."""
        flow = self.make()
        t, x = self._draw(flow, 6)
        leading = flow.log_prob(t, x), flow.score(t, x)
        for i, time in enumerate(self.times):
            each = t[i].expand(6, 1)
            for way in (time, t[i, 0, 0], each):
                torch.testing.assert_close(flow.log_prob(way, x[i]), leading[0][i])
                torch.testing.assert_close(flow.score(way, x[i]), leading[1][i])

    def test_times_that_do_not_fit_raise(self) -> None:
        """``(n,)`` times beside ``(n, d)`` points raise, rather than give an ``(n, n)`` answer."""
        flow = self.make()
        _, x = self._draw(flow, 5)
        for method in (flow.log_prob, flow.score):
            try:
                method(torch.full((5,), self.times[0], dtype=self.dtype), x[0])
            except ShapeError:
                continue
            raise AssertionError("times (n,) beside points (n, d) must raise ShapeError")

    def test_score_is_the_gradient_of_the_log_density(self) -> None:
        """``score`` agrees with automatic differentiation of ``log_prob``."""
        flow = self.make()
        t, x = self._draw(flow, 20)
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(flow.log_prob(t, y).sum(), y)
        torch.testing.assert_close(flow.score(t, x).detach(), slope)

    def test_time_derivative_is_the_limit_of_differences(self) -> None:
        """``time_derivative`` agrees with a central difference."""
        flow, h = self.make(), 1e-5 if self.dtype == torch.float64 else 1e-2
        t, x = self._draw(flow, 20)
        with torch.no_grad():
            difference = (flow.log_prob(t + h, x) - flow.log_prob(t - h, x)) / (2 * h)
            slope = flow.time_derivative(t, x)
        scale = 1 + float(difference.abs().max())
        assert float((slope - difference).abs().max()) < (1e-6 if h == 1e-5 else 1e-2) * scale

    def test_samples_and_density_agree(self) -> None:
        r"""Stein's identities :math:`E\,s=0` and :math:`E\,x s^\top=-1` hold on samples."""
        flow = self.make()
        t, x = self._draw(flow, self.num_samples)
        with torch.no_grad():
            s = flow.score(t, x)
        products = x.unsqueeze(-1) * s.unsqueeze(-2) + torch.eye(x.shape[-1], dtype=x.dtype)
        for values in (s, products.flatten(-2)):
            error = values.std(1) / self.num_samples**0.5
            assert bool((values.mean(1).abs() <= 5 * error + 1e-12).all()), "samples don't follow the density"

    def test_density_integrates_to_one(self) -> None:
        """Importance sampling from a wider normal gives mass one, within five standard errors."""
        if not self.normalised:
            return
        flow = self.make()
        _, x = self._draw(flow, self.num_samples)
        for time, points in zip(self.times, x, strict=True):
            d = points.shape[-1]
            centred = points - points.mean(0)
            wide = 2 * (centred.mT @ centred) / self.num_samples + 1e-6 * torch.eye(d, dtype=x.dtype)
            proposal = torch.distributions.MultivariateNormal(points.mean(0), wide)
            noise = torch.randn(points.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
            y = points.mean(0) + noise @ torch.linalg.cholesky(wide).mT
            with torch.no_grad():
                ratio = (flow.log_prob(time, y) - proposal.log_prob(y)).exp()
            error = float(ratio.std() / self.num_samples**0.5)
            assert abs(float(ratio.mean()) - 1) < 5 * error + 1e-12, "the density doesn't integrate to one"
