"""The exact interpolant between two Gaussian mixtures: the truth that every estimate is held against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_event_size,
    check_real,
    check_same_dtype,
    check_type,
)
from stochdyn.core.forward.flow import MarginalFlow, as_time
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.interpolants.paths.gaussian_mixture import GaussianMixture, mixture_parts
from stochdyn.interpolants.paths.interpolant import Interpolant, check_times

__all__ = ["GaussianMixtureInterpolant"]


class GaussianMixtureInterpolant(MarginalFlow):
    r"""Law, velocity, score and noise predictions of an interpolant between independent Gaussian mixtures.

    With :math:`m_{ij}=\alpha m^0_i+\beta m^1_j`, :math:`C_{ij}=\alpha^2C^0_i+\beta^2C^1_j+\gamma^2I` and
    :math:`y_{ij}=C_{ij}^{-1}(x-m_{ij})`,

    .. math::
        \rho_t=\sum_{ij}p^0_ip^1_jN(m_{ij},C_{ij}),\qquad
        b=\sum_{ij}w_{ij}\big(\dot m_{ij}+\tfrac12\dot C_{ij}y_{ij}\big),\qquad
        s=-\sum_{ij}w_{ij}y_{ij},

    where :math:`w_{ij}(x)` is the posterior of the pair of components, taken from logarithms so that nothing
    overflows far from the modes. Covariances that commute are diagonalised once, so that a time costs
    :math:`O(Kd)`; others are factorised for every distinct time.

    Args:
        interpolant: The path, without a correction.
        mixture0: The first law: :class:`GaussianMixture`, a Gaussian, or a triple of weights, means, covariances. None
            for the standard normal. On mirror paths it is the second law whatever is given.
        mixture1: The second law, likewise.

    Raises:
        ShapeError: If the laws have different dimensions.
        InvalidInputError: If a law isn't a mixture of Gaussians, or a one-sided path doesn't start in the standard
            normal.

    Example:
        >>> ends = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), 0.1)
        >>> truth = GaussianMixtureInterpolant(Interpolant("linear"), None, ends)
        >>> truth.velocity(0.0, torch.zeros(1, 1)).shape, truth.log_prob(1.0, torch.full((1, 1), 2.0))
        (torch.Size([1, 1]), tensor([-0.4608]))

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, appendix A.
    """

    weights: Tensor
    means0: Tensor
    means1: Tensor
    covariances0: Tensor
    covariances1: Tensor
    basis: Tensor
    spread0: Tensor
    spread1: Tensor

    def __init__(self, interpolant: Interpolant, mixture0: Any, mixture1: Any) -> None:
        super().__init__()
        check_type(interpolant, Interpolant, "interpolant")
        if interpolant.correction is not None:
            raise InvalidInputError("an interpolant with a correction has no closed form")
        second = mixture_parts(mixture1, "mixture1")
        dim, like = second[1].shape[-1], second[1]
        if interpolant.kind == "mirror":
            first = (like.new_ones(1), like.new_zeros(1, dim), torch.eye(dim).to(like)[None])
        elif mixture0 is None:
            first = mixture_parts((like.new_ones(1), like.new_zeros(1, dim), 1.0), "mixture0")
        else:
            first = mixture_parts(mixture0, "mixture0")
        if first[1].shape[-1] != dim:
            raise ShapeError("the laws have different dimensions", got=f"{first[1].shape[-1]} and {dim}")
        check_same_dtype(mixture0=first[1], mixture1=second[1])
        self.interpolant, self.dim = interpolant, dim
        self.base, self.target = GaussianMixture(*first), GaussianMixture(*second)
        if interpolant.kind == "one-sided":
            eye = torch.eye(dim).to(like)
            if float(first[1].abs().max()) > 0 or float((first[2] - eye).abs().max()) > 1e-12:
                raise InvalidInputError(
                    "a one-sided path starts in the standard normal", got="another mixture0"
                )
        k0, k1 = len(first[0]), len(second[0])
        pairs = {
            "weights": (first[0][:, None] * second[0]).flatten(),
            "means0": first[1].repeat_interleave(k1, 0),
            "means1": second[1].repeat(k0, 1),
            "covariances0": first[2].repeat_interleave(k1, 0),
            "covariances1": second[2].repeat(k0, 1, 1),
        }
        for name, value in pairs.items():
            self.register_buffer(name, value.contiguous())
        self.commuting = self._diagonalise()

    def _diagonalise(self) -> bool:
        """Find a common eigenbasis of every pair of covariances, if there is one."""
        c0, c1 = self.covariances0, self.covariances1
        size0, size1 = (c.abs().amax((-2, -1), keepdim=True) for c in (c0, c1))
        # a generic combination has the eigenvectors that both share
        basis = torch.linalg.eigh(c0 / size0 + 0.6180339887 * c1 / size1)[1]
        rotated = [basis.mT @ c @ basis for c in (c0, c1)]
        spreads = [r.diagonal(dim1=-2, dim2=-1) for r in rotated]
        slack = 100 * torch.finfo(c0.dtype).eps
        rest = max(
            float(((r - torch.diag_embed(s)).abs() / n).max())
            for r, s, n in zip(rotated, spreads, (size0, size1), strict=True)
        )
        self.register_buffer("basis", basis)
        self.register_buffer("spread0", spreads[0].contiguous())
        self.register_buffer("spread1", spreads[1].contiguous())
        return rest < slack * self.dim**0.5

    def _coefficients(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return alpha, beta, gamma^2 and the halves of the derivatives of the three squares."""
        it = self.interpolant
        a, b, g = it.alpha, it.beta, it.gamma
        return (
            a.value(t), b.value(t), g.square(t),
            0.5 * a.square_derivative(t), 0.5 * b.square_derivative(t), 0.5 * g.square_derivative(t),
            a.square(t), b.square(t),
        )  # fmt: skip

    def _solve(self, t: Tensor | float, x: Tensor) -> _Pairs:
        x = as_tensor(x, "x", like=self.means0, finite=False)
        check_event_size(x, self.dim, "x")
        time = as_time(t, x)
        check_times(time)
        check_same_dtype(x=x, mixture=self.means0)
        return _Pairs(self, time.to(x.dtype), x)

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` of the law at a time, at points ``(..., d)``."""
        return self._solve(t, x).joint.logsumexp(-1)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the score ``(..., d)`` of the law at a time, at points ``(..., d)``."""
        return -self._solve(t, x).latent()

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`b(t,x)=E[\dot x_t\mid x_t=x]`, ``(..., d)``, finite on the whole of [0, 1]."""
        return self._solve(t, x).velocity()

    def velocity_and_score(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both from one solution."""
        pairs = self._solve(t, x)
        return pairs.velocity(), -pairs.latent()

    def path_velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`v(t,x)=E[\partial_tI\mid x_t=x]`, ``(..., d)``; :math:`b=v-\gamma\dot\gamma s`."""
        return self._solve(t, x).velocity(latent=False)

    def noise_prediction(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\eta_z(t,x)=E[z\mid x_t=x]`, ``(..., d)``; on one-sided paths z is :math:`x_0`.

        Raises:
            UnavailableError: If the path has no latent.
        """
        it = self.interpolant
        if it.kind != "one-sided" and not it.has_latent:
            raise UnavailableError("this path has no latent to estimate", hint="give the interpolant a gamma")
        x = as_tensor(x, "x", like=self.means0, finite=False)
        time = as_time(t, x)
        return it.noise.value(time.to(x.dtype)) * self._solve(t, x).latent()

    def start_prediction(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\eta_0(t,x)=E[x_0\mid x_t=x]`, ``(..., d)``."""
        return self._solve(t, x).end(0)

    def data_prediction(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\eta_1(t,x)=E[x_1\mid x_t=x]`, ``(..., d)``."""
        return self._solve(t, x).end(1)

    def forward_drift(self, t: Tensor | float, x: Tensor, epsilon: float) -> Tensor:
        r"""Return :math:`b+\varepsilon s`, the drift of the forward equation with noise :math:`\sqrt{2\varepsilon}\,dW`."""
        velocity, score = self.velocity_and_score(t, x)
        return velocity + epsilon * score

    def time_derivative(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the rate of change of the log density, by the transport equation, so exact at the ends too."""
        from stochdyn.core.forward.divergences import value_and_divergence

        time = as_time(t, x)
        b, div = value_and_divergence(lambda y: self.velocity(time, y), x)
        return -div - (b * self.score(time, x)).sum(-1)

    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        """Draw points from the law at a time."""
        own = as_sample_shape(sample_shape)
        if not isinstance(t, Tensor):
            check_real(t, "t")
            t = torch.tensor(float(t), dtype=self.means0.dtype)
        if not t.is_floating_point():
            raise InvalidInputError("t must be floating", got=t.dtype)
        check_times(t)
        t = t.to(self.means0.dtype)
        source = as_generator(generator, self.means0.device)
        shape = (*t.shape, torch.Size(own).numel(), self.dim)
        x0, x1 = (law.draw(shape[:-1], source) for law in (self.base, self.target))
        z = torch.randn(shape, dtype=x0.dtype, device=x0.device, generator=source)
        x = self.interpolant.sample(t[..., None, None] if t.ndim else t, x0, x1, z)
        return x.reshape(*t.shape, *own, self.dim)

    def moments(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean ``(d,)`` and covariance ``(d, d)`` of the whole mixture at one time."""
        time = torch.as_tensor(t, dtype=self.means0.dtype, device=self.means0.device)
        a, b, g2, *_, a2, b2 = self._coefficients(time)
        means = a * self.means0 + b * self.means1
        eye = torch.eye(self.dim, dtype=means.dtype, device=means.device)
        inner = a2 * self.covariances0 + b2 * self.covariances1 + g2 * eye
        mean = self.weights @ means
        centred = means - mean
        outer = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        return mean, (self.weights[:, None, None] * (inner + outer)).sum(0)


class _Pairs:
    """Everything about all pairs of components at given times and points; pairs are the axis before the last."""

    def __init__(self, flow: GaussianMixtureInterpolant, t: Tensor, x: Tensor) -> None:
        self.flow = flow
        # times (..., 1) become (..., 1, 1): an axis for pairs
        self.time = t.unsqueeze(-1) if t.ndim else t
        a, b, g2, self.aa, self.bb, self.gg, a2, b2 = flow._coefficients(self.time)
        self.a, self.b = a, b
        offset = x.unsqueeze(-2) - (a * flow.means0 + b * flow.means1)
        if flow.commuting:
            variance = a2 * flow.spread0 + b2 * flow.spread1 + g2
            turned = _turn(offset, flow.basis)
            self.white = turned / variance
            quadratic = (turned * self.white).sum(-1)
            log_det = variance.log().sum(-1)
            self.y = _turn(self.white, flow.basis.mT)
        else:
            quadratic, log_det = self._factorise(offset, a2, b2, g2)
        constant = flow.dim * math.log(2 * math.pi)
        self.joint = flow.weights.log() - 0.5 * (quadratic + log_det + constant)
        self.share = self.joint.softmax(-1).unsqueeze(-1)

    def _factorise(self, offset: Tensor, a2: Tensor, b2: Tensor, g2: Tensor) -> tuple[Tensor, Tensor]:
        flow = self.flow
        eye = torch.eye(flow.dim, dtype=offset.dtype, device=offset.device)
        a2, b2, g2 = (c.unsqueeze(-1) if c.ndim else c for c in (a2, b2, g2))
        covariance = a2 * flow.covariances0 + b2 * flow.covariances1 + g2 * eye
        factor = torch.linalg.cholesky(covariance)
        shape = torch.broadcast_shapes(factor.shape[:-2], offset.shape[:-1])
        if factor.ndim == 3:
            # one time for all points: solve all points of a pair together
            columns = offset.reshape(-1, *offset.shape[-2:]).permute(1, 2, 0)
            solved = torch.cholesky_solve(columns, factor).permute(2, 0, 1).reshape(offset.shape)
        else:
            wide = factor.expand(*shape, flow.dim, flow.dim)
            solved = torch.cholesky_solve(offset.expand(*shape, flow.dim).unsqueeze(-1), wide).squeeze(-1)
        self.y = solved
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (offset * solved).sum(-1), log_det

    def latent(self) -> Tensor:
        """Posterior mean of C^-1 (x - m), ``(..., d)``: minus the score."""
        return (self.share * self.y).sum(-2)

    def _through(self, which: int) -> Tensor:
        """Return C0 y or C1 y, ``(..., K, d)``."""
        flow = self.flow
        if flow.commuting:
            spread = flow.spread1 if which else flow.spread0
            return _turn(spread * self.white, flow.basis.mT)
        covariance = flow.covariances1 if which else flow.covariances0
        return (covariance @ self.y.unsqueeze(-1)).squeeze(-1)

    def end(self, which: int) -> Tensor:
        """Posterior mean of x0 or x1."""
        flow = self.flow
        mean, factor = (flow.means1, self.b) if which else (flow.means0, self.a)
        return (self.share * (mean + factor * self._through(which))).sum(-2)

    def velocity(self, latent: bool = True) -> Tensor:
        """Posterior mean of the velocity, with or without its latent part."""
        it, flow = self.flow.interpolant, self.flow
        parts = it.beta.derivative(self.time) * flow.means1 + self.bb * self._through(1)
        if it.kind != "mirror":
            parts = parts + self.aa * self._through(0)
            parts = parts + torch.where(
                flow.means0 == 0, flow.means0, it.alpha.derivative(self.time) * flow.means0
            )
        if latent:
            parts = parts + self.gg * self.y
        return (self.share * parts).sum(-2)


def _turn(x: Tensor, basis: Tensor) -> Tensor:
    """Return ``basis^T x`` for every pair, ``(..., K, d)``."""
    return torch.einsum("...ki,kij->...kj", x, basis)
