"""Engines of Gaussian-process regression behind one interface: in feature space, and dense for any kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from torch import Tensor, nn

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.regression.kernels import FeatureKernel
from stochdyn.vectorfields.regression.linear_model import (
    Gram,
    WeightPosterior,
    accumulate,
    log_evidence,
    weight_posterior,
)
from stochdyn.vectorfields.regression.observations import Observations
from stochdyn.vectorfields.regression.optimise import log_prior, maximise
from stochdyn.vectorfields.regression.rows import rows_of
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["DenseEngine", "Engine", "SpectralEngine", "feature_terms"]

#: Numbers of a block of features that are held at once.
_CHUNK = 16_000_000
#: Width of the prior of the noise, in logarithms.
_NOISE_WIDTH = 2.5
#: The most rows for which a dense covariance is factorised.
MAX_DENSE_ROWS = 12_000


class Engine(nn.Module, ABC):
    """A Gaussian process with an amplitude, a noise variance and a kernel, conditioned on observations."""

    def __init__(self, parts: Sequence[Observations]) -> None:
        super().__init__()
        numbers = sum(part.components.numel() for part in parts)
        scale = sum(float((part.components**2).sum()) for part in parts) / numbers
        scale = scale if scale > 0 else 1.0
        typical = float(torch.cat([part.relative for part in parts]).median())
        # The search begins with the data's own variance, a twentieth of which is noise.
        self.usual_noise = math.log(0.05 * scale / typical)
        self.log_amplitude = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        self.log_noise = nn.Parameter(torch.tensor(self.usual_noise, dtype=torch.float64))

    def noise_prior(self, log_noise: Tensor) -> Tensor:
        """Return the log prior of the noise: flat above a twentieth of the data's variance, log-normal below.

        Where fields are as rough as the graph, noise and field can't be told apart, the evidence is flat, and its maximum
        may lie at no noise at all, which makes bands at the data far too narrow. Data without noise outweigh the prior.
        """
        below = (log_noise - self.usual_noise).clamp(max=0.0) / _NOISE_WIDTH
        return -0.5 * below**2

    @property
    def amplitude(self) -> Tensor:
        """Prior variance of a component."""
        return self.log_amplitude.exp()

    @property
    def noise(self) -> Tensor:
        """Noise variance τ² of a component, to be multiplied by the relative ones."""
        return self.log_noise.exp()

    @abstractmethod
    def evidence(self) -> Tensor:
        """Return the log marginal likelihood of all fields."""

    @abstractmethod
    def condition(self) -> None:
        """Compute the posterior under the present hyper-parameters."""

    @abstractmethod
    def mean(self, sites: Sites) -> Tensor:
        """Return posterior means of components, ``(B, q, m)``."""

    @abstractmethod
    def covariance(self, sites: Sites) -> Tensor:
        """Return posterior covariances at each site: ``(q, m, m)`` where all fields share them, else ``(B, q, m, m)``."""

    def mean_variance(self) -> Tensor:
        """Return the kernel's own variance of a component, averaged over the cloud: one unless it holds scales of its own."""
        return torch.ones((), dtype=torch.float64)

    @abstractmethod
    def missing_variance(self, sites: Sites) -> Tensor:
        """Return the prior variance ``(q,)`` of a component that reading fields off the nodes leaves out at each site."""

    @abstractmethod
    def sample(self, n: int, sites: Sites, generator: torch.Generator | None) -> Tensor:
        """Draw from the joint posterior, ``(n, B, q, m)``."""

    @abstractmethod
    def optimise(self, steps: int, learn_noise: bool) -> None:
        """Maximise the evidence times the priors over amplitude, noise and the kernel's hyper-parameters."""

    @property
    @abstractmethod
    def num_sites(self) -> int:
        """Number of sites where some field was observed, counted once for each group of fields."""


class PlainEngine(Engine):
    """An engine of fields that were all observed at the same sites.

    Args:
        data: What was observed.
    """

    def __init__(self, data: Observations) -> None:
        super().__init__([data])
        self.data = data

    @property
    def num_sites(self) -> int:
        """Number of sites where the fields were observed."""
        return len(self.data.sites)

    def optimise(self, steps: int, learn_noise: bool) -> None:
        """Maximise the evidence times the priors over amplitude, noise and the kernel's hyper-parameters."""
        self.search([self], steps, learn_noise)

    @abstractmethod
    def search(self, members: Sequence[PlainEngine], steps: int, learn_noise: bool) -> None:
        """Maximise the summed evidence of engines of one kind that share their hyper-parameters with this one."""

    @abstractmethod
    def share(self, other: PlainEngine) -> None:
        """Take the hyper-parameters of another engine of the same kind, as the same objects."""


class _GaussianLogDensity(torch.autograd.Function):
    """The summed log density of columns ``(N, B)`` under N(0, C); its slope in C costs one inverse, less than backpropagation."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor, y: Tensor) -> Tensor:
        # log N(y; 0, C) = -½ (y'C⁻¹y + log|C| + N log 2π), summed over columns.
        factor = torch.linalg.cholesky(covariance)
        solved = torch.cholesky_solve(y, factor)
        ctx.save_for_backward(covariance, y, factor, solved)
        rows, fields = y.shape
        volume = rows * math.log(2 * math.pi) + 2.0 * factor.diagonal().log().sum()
        return -0.5 * ((y * solved).sum() + fields * volume)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        covariance, y, factor, solved = ctx.saved_tensors
        # derivatives of the derivative may be wanted: factor and solution are redone on tape
        if torch.is_grad_enabled():
            factor = torch.linalg.cholesky(covariance)
            solved = torch.cholesky_solve(y, factor)
        # d log N / dC = ½ (C⁻¹y y'C⁻¹ - C⁻¹) per column.
        inverse = torch.cholesky_inverse(factor)
        return 0.5 * slope * (solved @ solved.mT - solved.shape[1] * inverse), -slope * solved


class _TorchEngine(PlainEngine):
    """An engine whose evidence torch differentiates."""

    def __init__(self, data: Observations, kernel: Kernel) -> None:
        super().__init__(data)
        self.kernel = kernel

    def mean_variance(self) -> Tensor:
        """Return the variance of a component under the kernel alone, averaged over the observed sites."""
        return mean_variance(self.kernel, self.data.sites)

    def missing_variance(self, sites: Sites) -> Tensor:
        """Return what the kernel's features leave out at the sites, in units of the data, ``(q,)``."""
        with torch.no_grad():
            return self.amplitude * missing_variance(self.kernel, sites)

    def search(self, members: Sequence[PlainEngine], steps: int, learn_noise: bool) -> None:
        """Maximise the summed evidence and the priors by L-BFGS, with gradients from torch."""
        own = {"amplitude": self.log_amplitude} | ({"noise": self.log_noise} if learn_noise else {})
        scale = 1.0 / sum(member.data.components.numel() for member in members)

        def value() -> Tensor:
            total = torch.stack([member.evidence() for member in members]).sum()
            prior = log_prior(self.kernel) + (self.noise_prior(self.log_noise).cpu() if learn_noise else 0.0)
            return scale * (total.cpu() + prior)

        maximise(value, [self.kernel], own, steps)

    def share(self, other: PlainEngine) -> None:
        """Take amplitude and noise of another engine; the kernel is the same object already."""
        self.log_amplitude, self.log_noise = other.log_amplitude, other.log_noise


def feature_terms(kernel: Kernel) -> list[tuple[FeatureKernel, list[ScaleKernel]]] | None:
    """Take a sum of scaled finite-rank kernels apart; None if some part has no features."""
    if isinstance(kernel, FeatureKernel):
        return [(kernel, [])]
    if isinstance(kernel, ScaleKernel):
        inner = feature_terms(kernel.base_kernel)
        return None if inner is None else [(base, [kernel, *scales]) for base, scales in inner]
    if isinstance(kernel, AdditiveKernel):
        parts = [feature_terms(part) for part in kernel.kernels]
        return None if any(p is None for p in parts) else [term for p in parts if p is not None for term in p]
    return None


def missing_variance(kernel: Kernel, sites: Sites) -> Tensor:
    """Return the prior variance ``(q,)`` that the features of a kernel leave out at sites; sums and multiples are taken apart."""
    if isinstance(kernel, FeatureKernel):
        return kernel.missing_variance(sites)
    if isinstance(kernel, ScaleKernel):
        return kernel.outputscale * missing_variance(kernel.base_kernel, sites)
    none = torch.zeros(len(sites), dtype=torch.float64, device=sites.points.device)
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        # factors of a product are scalar kernels of variance one, but for one
        return sum((missing_variance(part, sites) for part in kernel.kernels), none)
    return none


def mean_variance(kernel: Kernel, sites: Sites) -> Tensor:
    """Return the mean variance of a component: that of features by construction, of other kernels over the sites."""
    if isinstance(kernel, FeatureKernel):
        return torch.ones((), dtype=torch.float64)
    if isinstance(kernel, ScaleKernel):
        return kernel.outputscale * mean_variance(kernel.base_kernel, sites)
    if isinstance(kernel, AdditiveKernel):
        return torch.stack([mean_variance(part, sites) for part in kernel.kernels]).sum()
    return kernel(rows_of(sites), diag=True).mean()


class SpectralEngine(_TorchEngine):
    """Regression in feature space: one pass over the data, then solves of the size of the features.

    The evidence of fewer rows than features costs solves of the size of the data.

    Args:
        data: What was observed.
        kernel: A :class:`FeatureKernel`, or sums and multiples of such.
    """

    def __init__(self, data: Observations, kernel: Kernel) -> None:
        super().__init__(data, kernel)
        terms = feature_terms(kernel)
        if terms is None:
            raise InvalidInputError(
                "the spectral backend needs kernels with features",
                got=type(kernel).__name__,
                hint="leave backend to its default, which falls back to a dense covariance",
            )
        self._terms = terms
        self.stats: Gram = accumulate(self._parts())
        few = data.rows < self.stats.gram.shape[0]
        self._design = torch.cat([phi for phi, _, _ in self._parts()]) if few else None
        self.posterior: WeightPosterior | None = None

    def features(self, sites: Sites) -> Tensor:
        """Return the features of all terms, ``(q, m, k)``."""
        return torch.cat([base.features(sites) for base, _ in self._terms], -1)

    def prior_variances(self) -> Tensor:
        """Return the prior variances of the weights without the amplitude, ``(k,)``."""
        parts = []
        for base, scales in self._terms:
            weight = base.spectral_weights()
            for scale in scales:
                weight = weight * scale.outputscale
            parts.append(weight)
        return torch.cat(parts)

    def _step(self, width: int) -> int:
        return max(1, _CHUNK // (width * self.data.components.shape[2]))

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        width = sum(base.spectral_weights().shape[0] for base, _ in self._terms)
        step = self._step(width)
        with torch.no_grad():
            for start in range(0, len(self.data.sites), step):
                part = slice(start, start + step)
                phi = self.features(self.data.sites.take(part)).flatten(0, 1)
                yield (phi, *self.data.columns(part))

    def evidence(self) -> Tensor:
        """Return the evidence from the feature-space form, or from the data-space form where rows are fewer."""
        s = self.amplitude * self.prior_variances()
        if self._design is None:
            return log_evidence(self.stats, s, self.noise)
        y, relative = self.data.columns()
        covariance = (self._design * s) @ self._design.mT + torch.diag_embed(self.noise * relative)
        return cast(Tensor, _GaussianLogDensity.apply(covariance, y))

    def condition(self) -> None:
        """Compute the Gaussian posterior of the weights of the features."""
        with torch.no_grad():
            s = self.amplitude * self.prior_variances()
            self.posterior = weight_posterior(self.stats, s, self.noise)

    def _law(self) -> WeightPosterior:
        assert self.posterior is not None
        return self.posterior

    def _by_chunk(self, sites: Sites) -> Iterator[tuple[slice, Tensor]]:
        step = self._step(self._law().root.shape[0])
        with torch.no_grad():
            for start in range(0, len(sites), step):
                part = slice(start, start + step)
                yield part, self.features(sites.take(part))

    def mean(self, sites: Sites) -> Tensor:
        """Return the features at the sites times the weights' mean, ``(B, q, m)``."""
        return torch.cat([phi @ self._law().mean for _, phi in self._by_chunk(sites)]).movedim(-1, 0)

    def covariance(self, sites: Sites) -> Tensor:
        """Return the weights' covariance as seen through the features at each site, ``(q, m, m)``."""
        halves = (phi @ self._law().root for _, phi in self._by_chunk(sites))
        return torch.cat([half @ half.mT for half in halves])

    def sample(self, n: int, sites: Sites, generator: torch.Generator | None) -> Tensor:
        """Draw weights and read them through the features at the sites, ``(n, B, q, m)``."""
        weights = self._law().sample(n, generator)
        drawn = [torch.einsum("qak,nkb->nbqa", phi, weights) for _, phi in self._by_chunk(sites)]
        return torch.cat(drawn, 2)


class DenseEngine(_TorchEngine):
    """Regression with the dense covariance of the observed components, for kernels without features.

    Args:
        data: What was observed.
        kernel: A gpytorch kernel of rows.
        cloud: The points that sample the manifold.

    Raises:
        InvalidInputError: If there are more rows than a dense matrix can hold.
    """

    def __init__(self, data: Observations, kernel: Kernel, cloud: PointCloud) -> None:
        super().__init__(data, kernel)
        if data.rows > MAX_DENSE_ROWS:
            raise InvalidInputError(
                "there are too many observations for a dense covariance",
                got=f"{data.rows} components",
                expected=f"at most {MAX_DENSE_ROWS}",
                hint="use a kernel with features (connection, projected) or the precision backend",
            )
        self.cloud = cloud
        self._x = rows_of(data.sites)
        self._y, self._relative = data.columns()

    def _covariance(self) -> Tensor:
        covariance = self.amplitude * self.kernel(self._x, self._x).to_dense()
        return covariance + torch.diag_embed(self.noise * self._relative)

    def evidence(self) -> Tensor:
        """Return the log density of the data under the dense covariance."""
        return cast(Tensor, _GaussianLogDensity.apply(self._covariance(), self._y))

    def condition(self) -> None:
        """Factorise the covariance of the data, and solve for the data once."""
        with torch.no_grad():
            self._root = torch.linalg.cholesky(self._covariance())
            self._solved = torch.cholesky_solve(self._y, self._root)

    def _cross(self, rows: Tensor) -> Tensor:
        return self.amplitude * self.kernel(rows, self._x).to_dense()

    def mean(self, sites: Sites) -> Tensor:
        """Return the cross-covariances with the data times the solved data, ``(B, q, m)``."""
        with torch.no_grad():
            flat = self._cross(rows_of(sites)) @ self._solved
        return flat.mT.reshape(flat.shape[1], len(sites), -1)

    def _posterior(self, rows: Tensor) -> Tensor:
        # K** - K*x C⁻¹ Kx*, with C = L L' and half = L⁻¹ Kx*.
        half = torch.linalg.solve_triangular(self._root, self._cross(rows).mT, upper=False)
        return self.amplitude * self.kernel(rows, rows).to_dense() - half.mT @ half

    def covariance(self, sites: Sites) -> Tensor:
        """Return the posterior covariance of the components at each site, ``(q, m, m)``."""
        m = sites.frames.shape[-1]
        blocks = []
        step = max(1, 1000 // m)
        with torch.no_grad():
            for start in range(0, len(sites), step):
                part = sites.take(slice(start, start + step))
                joint = self._posterior(rows_of(part)).reshape(len(part), m, len(part), m)
                blocks.append(joint.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        return torch.cat(blocks)

    def sample(self, n: int, sites: Sites, generator: torch.Generator | None) -> Tensor:
        """Draw by the eigenvectors of the joint posterior covariance, which may be singular, ``(n, B, q, m)``."""
        with torch.no_grad():
            joint = self._posterior(rows_of(sites))
            values, vectors = torch.linalg.eigh(0.5 * (joint + joint.mT))
            root = vectors * values.clamp(min=0).sqrt()
            mean = self.mean(sites)
            shape = (n, mean.shape[0], root.shape[1])
            normal = torch.randn(shape, generator=generator, dtype=root.dtype, device=root.device)
            return mean + (normal @ root.mT).reshape(n, *mean.shape)
