"""What every law on paths must satisfy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.core.forward.continuity import TransportOperator
from stochdyn.core.forward.flow import MarginalFlow
from stochdyn.core.law.marginals import Marginal
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path
from stochdyn.errors import (
    InvalidInputError,
    StochdynError,
    TimeGridError,
    UnavailableError,
)
from stochdyn.testing.invariances import check_storage

__all__ = ["PathMeasureSuite"]


class PathMeasureSuite(ABC):
    """Tests of a :class:`stochdyn.PathMeasure`; subclasses implement :meth:`make`.

    A law passes that is ready to be sampled, of any kind of path. Verbs that it lacks may raise
    :class:`~stochdyn.errors.UnavailableError`; all others are held against each other. Monte Carlo bounds are five standard
    errors wide.

    Attributes:
        num_samples: The number of paths that Monte Carlo identities use.
        bias: The distance by which a moment of the samples may lie from that of the marginal beside the Monte Carlo
            error, in standard deviations of the state: what a discretised law needs.
        forward_error: The amount by which the marginals may be away from solving the forward equation, relative to its
            terms: zero but for rounding and differences in an exact law, more where the law approximates a nonlinear
            one.
        batch: The batch shape of the law.

    Example:
        >>> from stochdyn.core import DiffusionMeasure, SDE
        >>> class TestMyLaw(PathMeasureSuite):
        ...     def make(self):
        ...         return DiffusionMeasure(torch.zeros(1), SDE(lambda t, x: -x, 0.5))
        >>> TestMyLaw().test_the_generator_decides_the_paths()
    """

    num_samples: int = 2000
    bias: float = 0.02
    forward_error: float = 1e-3
    batch: tuple[int, ...] = ()

    @abstractmethod
    def make(self) -> PathMeasure:
        """Return the law, ready to be sampled; the same one at every call."""

    def ts(self) -> Tensor:
        """Return a grid on which the law is sampled, fine enough for its discretisation."""
        return torch.linspace(0, 1, 21, dtype=torch.float64)

    def other(self) -> PathMeasure | None:
        """Return a law that is equivalent to the first one, or None if its log ratio isn't known."""
        return None

    def outside(self) -> float | None:
        """Return a time at which the law doesn't live, or None if it lives at all times."""
        return None

    def test_shapes_are_sample_batch_time_dim(self) -> None:
        """A number, a tuple and nothing lead to the axes that they say."""
        law, ts = self.make(), self.ts()
        for sample_shape, axes in ((), ()), (3, (3,)), ((2, 3), (2, 3)), ([2], (2,)):
            path = law.sample(ts, sample_shape, 0)
            assert isinstance(path, Path), "sample doesn't return a path"
            assert path.shape == (*axes, *self.batch)
            assert path.x.shape[:-1] == (*axes, *self.batch, len(ts))
            assert torch.equal(path.ts.to(ts), ts)
            assert path.law is law
            assert not path.detach().x.requires_grad

    def test_the_generator_decides_the_paths(self) -> None:
        """A seed, and a generator in a state, give the same paths again, and torch's global one stays untouched."""
        law, ts, before = self.make(), self.ts(), torch.get_rng_state()
        draws = [law.sample(ts, 3, source).x for source in (5, 5, 6)]
        assert torch.equal(draws[0], draws[1]), "the same seed gives other paths"
        assert not torch.equal(draws[0], draws[2]), "two seeds give the same paths"
        again = [law.sample(ts, 3, torch.Generator().manual_seed(5)).x for _ in range(2)]
        assert torch.equal(again[0], again[1]), "a generator in the same state gives other paths"
        assert torch.equal(again[0], draws[0]), "a seed and a generator with that seed differ"
        assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            first = law.sample(ts, 3).x
            torch.manual_seed(7)
            assert torch.equal(first, law.sample(ts, 3).x), "the global generator doesn't decide"

    def test_times_may_be_data_of_any_kind(self) -> None:
        """Lists and arrays give the paths that a tensor gives."""
        law, ts = self.make(), self.ts()
        wanted = law.sample(ts, 2, 0).x
        for kind in (np.asarray(ts), ts.tolist(), tuple(ts.tolist())):
            got = law.sample(kind, 2, 0).x  # type: ignore[arg-type]
            torch.testing.assert_close(got.to(wanted), wanted, rtol=1e-4, atol=1e-5)

    def test_bad_grids_are_refused(self) -> None:
        """Grids that decrease, stand still, hold NaN or aren't numbers raise typed errors."""
        law, ts = self.make(), self.ts()
        for bad in (ts.flip(0), ts[[0, 0, 1]], ts[:0], "soon", None):
            _raises(TimeGridError, law.sample, bad)
        for hole in (float("nan"), float("inf")):
            broken = ts.clone()
            broken[-1] = hole
            _raises(InvalidInputError, law.sample, broken)

    def test_bad_shapes_and_sources_are_refused(self) -> None:
        """Sample shapes and generators of a wrong kind raise typed errors that name them."""
        law, ts = self.make(), self.ts()
        for bad in (-1, 1.5, "3", None, (2, -1), True):
            assert "sample_shape" in _raises(InvalidInputError, law.sample, ts, bad)
        for bad in ("seed", 1.5, -1):
            assert "generator" in _raises(InvalidInputError, law.sample, ts, 2, bad)

    def test_times_outside_the_law_are_refused(self) -> None:
        """Where the law doesn't live it has neither paths nor a marginal."""
        law, t = self.make(), self.outside()
        if t is None:
            return
        _raises(TimeGridError, law.marginal, t)
        both = torch.stack([self.ts()[0], torch.tensor(t).to(self.ts())]).sort().values
        _raises(TimeGridError, law.sample, both)

    def test_marginals_have_samples_and_moments(self) -> None:
        """Their shapes fit the law, and the same seed gives the same states."""
        law, ts = self.make(), self.ts()
        dim = law.sample(ts, 1, 0).x.shape[-1]
        marginal = law.marginal(ts[-1])
        assert isinstance(marginal, Marginal | torch.distributions.Distribution)
        draw: Callable[..., Tensor] = marginal.sample
        for shape, axes in ((), ()), (3, (3,)), ((2, 3), (2, 3)):
            assert draw(shape, 0).shape == (*axes, *self.batch, dim)
        assert torch.equal(draw(3, 1), draw(3, torch.Generator().manual_seed(1)))
        assert marginal.mean.shape == (*self.batch, dim)
        assert marginal.covariance.shape == (*self.batch, dim, dim)
        for bad in (float("nan"), "now", None):
            _raises(InvalidInputError, law.marginal, bad)

    def test_marginals_are_those_of_the_samples(self) -> None:
        """Means and second moments of paths, of the marginal's samples and the marginal's own agree."""
        law, ts = self.make(), self.ts()
        x = law.sample(ts, self.num_samples, 1).x.detach()
        # Rounding is relative to the size of the whole path: a pinned state comes out of large ones.
        rounding = _rounding(x.movedim(-2, 0).flatten(0, 1))
        for index in (len(ts) // 2, len(ts) - 1):
            marginal = law.marginal(ts[index])
            drawn, seen = marginal.sample(self.num_samples, 2).detach(), x[..., index, :]
            spread = seen.std(0)
            self._agree("mean", seen, drawn, spread, rounding)
            centre = seen.mean(0)
            floor = rounding**2
            self._agree("second moment", (seen - centre) ** 2, (drawn - centre) ** 2, spread**2, floor)
            error = 6 * spread / self.num_samples**0.5 + self.bias * spread + rounding
            assert bool(((marginal.mean.detach() - centre).abs() <= error).all()), (
                "the marginal's mean is off"
            )
            variance = marginal.covariance.detach().diagonal(dim1=-2, dim2=-1)
            fourth = ((seen - centre) ** 2).std(0)
            error = 6 * fourth / self.num_samples**0.5 + 2 * self.bias * spread**2 + rounding**2
            assert bool(((variance - spread**2).abs() <= error).all()), "the marginal's variance is off"

    def _agree(self, name: str, a: Tensor, b: Tensor, unit: Tensor, floor: Tensor) -> None:
        error = 5 * ((a.var(0) + b.var(0)) / self.num_samples).sqrt() + 2 * self.bias * unit + floor
        gap = (a.mean(0) - b.mean(0)).abs()
        assert bool((gap <= error).all()), (
            f"the {name} of paths and of the marginal differ by {float(gap.max()):.3g}"
        )

    def test_a_log_ratio_with_itself_is_zero(self) -> None:
        """On its own paths, by every estimator."""
        law, ts = self.make(), self.ts()
        path = law.sample(ts, 3, 0)
        for estimator in ("density", "rate", "stl"):
            try:
                value = law.log_rn(path, law, estimator)
            except UnavailableError:
                continue
            assert value.shape == path.shape
            assert float(value.detach().abs().max()) < 1e-4 * len(ts)

    def test_weights_have_mean_one(self) -> None:
        r""":math:`E_P[dQ/dP]=1`, and the log ratio changes its sign with the order of the laws."""
        law, other, ts = self.make(), self.other(), self.ts()
        if other is None:
            return
        path = other.sample(ts, self.num_samples, 3).detach()
        with torch.no_grad():
            log_ratio, reverse = law.log_rn(path, other), other.log_rn(path, law)
        torch.testing.assert_close(log_ratio, -reverse, rtol=1e-3, atol=1e-3)
        weight = log_ratio.exp()
        error = 5 * weight.std(0) / self.num_samples**0.5 + 1e-6
        assert bool(((weight.mean(0) - 1).abs() <= error).all()), (
            f"mean weight {weight.mean(0)} is not one within {error}"
        )

    def test_log_ratios_refuse_what_they_do_not_know(self) -> None:
        """Something that isn't a path, or isn't a law, raises a typed error."""
        law, ts = self.make(), self.ts()
        path = law.sample(ts, 2, 0)
        for bad in ((path, "law"), (path, None), (path.x, law), (None, law), (path, law, "densest")):
            _raises(StochdynError, law.log_rn, *bad)

    def test_characteristics_fit_the_state_or_say_why_not(self) -> None:
        """``drift``, ``rates`` and ``forward`` answer in the right shape or raise UnavailableError."""
        law, ts = self.make(), self.ts()
        x = law.sample(ts, 4, 0).x[..., len(ts) // 2, :].detach()
        t = ts[len(ts) // 2]
        answers: dict[str, Any] = {}
        for name, call in (
            ("drift", lambda: law.drift(t, x)),
            ("rates", lambda: law.rates(t)),
            ("forward", law.forward),
        ):
            try:
                answers[name] = call()
            except UnavailableError as error:
                assert type(law).__name__ in str(error) or name in str(error)
        if "drift" in answers:
            assert answers["drift"].shape == x.shape
            assert bool(torch.isfinite(answers["drift"]).all())
            torch.testing.assert_close(law.drift(float(t), x), answers["drift"], rtol=1e-4, atol=1e-5)
        if "rates" in answers:
            rates = answers["rates"].detach()
            assert float(rates.sum(-1).abs().max()) <= 1e-5 * float(rates.abs().max())

    def test_the_drift_is_that_of_the_paths(self) -> None:
        """The mean of the increments of paths is that of the drift times the step, within five standard errors."""
        law, ts = self.make(), self.ts()
        path = law.sample(ts, self.num_samples, 4)
        x = path.x.detach()
        index = len(ts) // 2
        try:
            before = law.drift(ts[index], x[..., index, :]).detach()
            after = law.drift(ts[index + 1], x[..., index + 1, :]).detach()
        except UnavailableError:
            return
        dt = float(ts[index + 1] - ts[index])
        move = x[..., index + 1, :] - x[..., index, :]
        excess = move - before * dt
        # The drift changes within a step, which a law with steps of its own follows and another one doesn't.
        error = 5 * excess.std(0) / self.num_samples**0.5 + self.bias * move.std(0)
        error = error + (after - before).mean(0).abs() * dt + _rounding(x[..., index, :])
        assert bool((excess.mean(0).abs() <= error).all()), "paths move with another drift"

    def test_densities_of_marginals_solve_the_forward_equation(self) -> None:
        """Where the law has a forward operator and its marginals have densities, on points of its own paths."""
        law, ts = self.make(), self.ts()
        index = 2 * len(ts) // 3
        x = law.sample(ts, 8, 5).x[..., index, :].detach()
        flow = _Marginals(law, float(ts[-1] - ts[0]) * (1e-5 if x.dtype == torch.float64 else 1e-2))
        try:
            operator = law.forward()
            law.marginal(ts[index]).log_prob(x)
        except UnavailableError:
            return
        if not isinstance(operator, TransportOperator):
            return
        change = flow.time_derivative(ts[index], x)
        residual = operator.residual(flow, ts[index].to(x), x).detach()
        size = 1e-3 + change.detach().abs().amax() + flow.speed(operator, ts[index].to(x), x).abs().amax()
        worst = float((residual.abs() / size).max())
        assert worst < self.forward_error, (
            f"the marginals miss the forward equation by {worst:.2g} of its terms"
        )

    def test_a_copy_is_the_same_law(self) -> None:
        """After deepcopy, and after loading the state of one law into a copy with other values."""
        ts = self.ts()
        check_storage(self.make(), lambda law: law.sample(ts, 2, 0).x.detach(), pickles=False)


class _Marginals(MarginalFlow):
    """The marginals of a law as a flow, whose time derivative is a difference."""

    def __init__(self, law: PathMeasure, step: float) -> None:
        super().__init__()
        self.law, self.step = law, step

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        return self.law.marginal(torch.as_tensor(t, dtype=torch.float64).reshape(-1)[0]).log_prob(x)

    def time_derivative(self, t: Tensor | float, x: Tensor) -> Tensor:
        now = torch.as_tensor(t, dtype=torch.float64).detach()
        ahead, behind = (self.log_prob(now + sign * self.step, x) for sign in (1, -1))
        return (ahead - behind) / (2 * self.step)

    def sample(self, t: Any, sample_shape: Any = (), generator: Any = None) -> Tensor:
        raise UnavailableError("these marginals are only evaluated")

    def speed(self, operator: TransportOperator, t: Tensor, x: Tensor) -> Tensor:
        """Return the size of the terms of the forward equation: velocity times score."""
        y = x.clone().requires_grad_()
        score = self.score(t, y)
        return (operator.velocity(t, y, score) * score).sum(-1).detach()


def _rounding(x: Tensor) -> Tensor:
    """Return what rounding may change in a mean of ``x (n, ...)``."""
    return 16 * torch.finfo(x.dtype).eps * x.abs().amax(0)


def _raises(kind: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    """Return the message of the error that a call must raise."""
    try:
        call(*args)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} accepts {args!r:.200}; expected {kind.__name__}")
