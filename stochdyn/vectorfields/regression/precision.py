"""Regression with a sparse precision matrix: the full-rank connection Matérn field of whole-number smoothness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.laplacian import Pencil
from stochdyn.vectorfields.geometry.spectrum import factorise
from stochdyn.vectorfields.regression.engines import PlainEngine
from stochdyn.vectorfields.regression.markov_field import MeanVariance, Normals, root_sample
from stochdyn.vectorfields.regression.observations import Observations
from stochdyn.vectorfields.regression.sites import Sites, lost_variance, variogram

__all__ = ["PrecisionEngine"]

#: Right-hand sides solved at once.
_BLOCK = 256
#: Up to this many places prior variances are exact; beyond, they come from so many draws.
_EXACT_VARIANCES, _DRAWS = 2000, 400
#: The least noise, relative to the amplitude, that the search goes to.
_LEAST_LOG_RATIO = math.log(1e-7)


class PrecisionEngine(PlainEngine):
    r"""The field with precision :math:`\tfrac1{\sigma^2c}\,M^{1/2}H^\nu M^{1/2}`, :math:`H=\tfrac{2\nu}{\kappa^2}I+M^{-1/2}LM^{-1/2}`, ν = 1, 2, 3...

    This is :class:`~stochdyn.vectorfields.regression.kernels.ConnectionMatern` with all its modes, in sparse algebra: c makes
    the prior variance one on average (weighted by masses). Evidence, posterior and samples cost sparse factorisations.

    Args:
        data: What was observed.
        cloud: The points that sample the manifold.
        nu: The smoothness ν, a whole number.
        lengthscale: The start of the search for κ; by default that of the spectral kernel.
        prior_scale: The width of the log-normal prior of κ around that start.
        density: The mean variance of the prior on this cloud, where another engine has computed it; None to compute it.

    Raises:
        InvalidInputError: If ν isn't a positive whole number.

    Reference:
        Lindgren, Rue and Lindström, "An explicit link between Gaussian fields and Gaussian Markov random fields", 2011.
    """

    def __init__(
        self,
        data: Observations,
        cloud: PointCloud,
        nu: float = 3,
        lengthscale: float | None = None,
        prior_scale: float = 1.5,
        density: MeanVariance | None = None,
    ) -> None:
        super().__init__(data)
        if not float(nu).is_integer() or nu < 1:
            raise InvalidInputError(
                "the precision backend needs a whole nu",
                got=nu,
                expected="1, 2, 3, ...",
                hint="3 is a good choice",
            )
        self.cloud, self.nu = cloud, int(nu)
        self.pencil: Pencil = cloud.pencil()
        self._operator = self.pencil.symmetric()
        self._identity = sp.identity(self._operator.shape[0], dtype=self._operator.dtype, format="csc")
        self._half_mass = np.sqrt(self.pencil.row_mass())
        low = cloud.modes(min(12, cloud.dim * len(cloud)))[0]
        # A length that the graph resolves well: the start of the search for κ, and the median of its prior.
        resolved = max(float(low[-1]), 1e-9 * cloud.spacing**-2)
        self.start = math.sqrt(2.0 * self.nu / resolved) if lengthscale is None else lengthscale
        self.prior_scale = prior_scale
        self.log_lengthscale = torch.nn.Parameter(torch.tensor(math.log(self.start), dtype=torch.float64))
        self.density = MeanVariance(cloud, self.pencil) if density is None else density
        self._sees = self._tie(data.sites)
        relative = data.relative.cpu().numpy()
        # in complex form a site is one row, and its two components share their noise
        self._relative = relative if self.pencil.paired else np.repeat(relative, self.pencil.fibre)
        y = data.components.cpu().numpy().transpose(1, 2, 0)
        self._y = self.pencil_columns(y)
        scaled = sp.diags(1.0 / self._relative) @ self._sees
        self._gram = (self._sees.conj().T @ scaled).tocsc()
        self._cross = scaled.conj().T @ self._y
        self._square = float((np.abs(self._y) ** 2 / self._relative[:, None]).sum())
        self._log_relative = float(np.log(relative).sum()) * self.pencil.fibre
        self._factor: Any = None

    @property
    def lengthscale(self) -> float:
        """κ, in the unit of the points."""
        return float(self.log_lengthscale.detach().exp())

    def pencil_columns(self, fields: np.ndarray) -> np.ndarray:
        """Turn components ``(q, m, B)`` into columns of unknowns."""
        return (
            fields[:, 0] + 1j * fields[:, 1] if self.pencil.paired else fields.reshape(-1, fields.shape[-1])
        )

    def _components(self, columns: np.ndarray) -> np.ndarray:
        """Turn columns of unknowns at some sites into components ``(q, m, B)``."""
        if self.pencil.paired:
            return np.stack([columns.real, columns.imag], 1)
        return columns.reshape(-1, self.pencil.fibre, columns.shape[-1])

    def _tie(self, sites: Sites) -> sp.csr_matrix:
        """What reads the scaled unknowns M^{1/2} u at sites."""
        nodes = sites.nodes.cpu().numpy()
        q, count = nodes.shape
        n, m = len(self.cloud), self.pencil.fibre
        share = sites.weights.cpu().numpy()
        maps = (
            np.broadcast_to(np.eye(m), (q, count, m, m)) if sites.maps is None else sites.maps.cpu().numpy()
        )
        if self.pencil.paired:
            blocks = share * (maps[..., 0, 0] + 1j * maps[..., 1, 0])
            rows = np.broadcast_to(np.arange(q)[:, None], (q, count))
            sees = sp.coo_matrix((blocks.ravel(), (rows.ravel(), nodes.ravel())), (q, n))
        else:
            blocks = share[..., None, None] * maps
            rows = np.arange(q)[:, None, None, None] * m + np.arange(m)[:, None]
            columns = nodes[..., None, None] * m + np.arange(m)
            rows, columns = np.broadcast_arrays(rows, columns)
            sees = sp.coo_matrix((blocks.ravel(), (rows.ravel(), columns.ravel())), (q * m, n * m))
        return (sees.tocsr() @ sp.diags(1.0 / self._half_mass)).tocsr()

    # ------------------------------------------------------------------------------------------ algebra

    def _prior(self, kappa: float) -> tuple[sp.csc_matrix, float]:
        """Prior precision for amplitude 1, and its log-determinant in real unknowns."""
        base = (self._operator + (2.0 * self.nu / kappa**2) * self._identity).tocsc()
        # variances average to one: divide by what they are without a factor
        factor = self.density(2.0 * self.nu / kappa**2, self.nu)
        power = base
        for _ in range(self.nu - 1):
            power = power @ base
        log_det = self.nu * _log_det(factorise(base)) + self._operator.shape[0] * math.log(factor)
        return (power * factor).tocsc(), log_det * (2 if self.pencil.paired else 1)

    def _misfit(self, ratio: float, prior: tuple[sp.csc_matrix, float]) -> tuple[float, float]:
        """Return y' C⁻¹ y and log det C, summed over fields, for the covariance C of the data at amplitude 1 and noise ``ratio``."""
        # C = H Q⁻¹ H' + ρR by Woodbury: y'C⁻¹y and log|C| from the factors of Q and of Q + H'R⁻¹H / ρ.
        precision, log_prior = prior
        factor = factorise((precision + self._gram / ratio).tocsc())
        solved = factor.solve(self._cross)
        gain = float((self._cross.conj() * solved).real.sum())
        misfit = self._square / ratio - gain / ratio**2
        log_post = _log_det(factor) * (2 if self.pencil.paired else 1)
        volume = log_post - log_prior + self.data.rows * math.log(ratio) + self._log_relative
        return misfit, self._y.shape[1] * volume

    def _summed(
        self, members: Sequence[PrecisionEngine], kappa: float, ratio: float
    ) -> tuple[float, float, int]:
        """Return misfit, log-determinant and number of values, summed over engines."""
        prior = self._prior(kappa)
        parts = [member._misfit(ratio, prior) for member in members]
        values = sum(member.data.components.numel() for member in members)
        return sum(p[0] for p in parts), sum(p[1] for p in parts), values

    def evidence(self) -> Tensor:
        """Return the evidence from two sparse factorisations."""
        amplitude, noise = float(self.amplitude.detach()), float(self.noise.detach())
        misfit, log_det, values = self._summed([self], self.lengthscale, noise / amplitude)
        value = -0.5 * (misfit / amplitude + values * math.log(2 * math.pi * amplitude) + log_det)
        return torch.tensor(value, dtype=torch.float64)

    def search(self, members: Sequence[PlainEngine], steps: int, learn_noise: bool) -> None:
        """Maximise the summed evidence and the priors by a simplex search, since derivatives would need inverses."""
        engines = cast("Sequence[PrecisionEngine]", members)
        noise = float(self.noise.detach())
        centre = math.log(self.start)

        def cost(x: np.ndarray) -> float:
            # without noise the misfit is a small difference of large numbers
            floor = max(x[1], _LEAST_LOG_RATIO)
            kappa, ratio = math.exp(x[0]), math.exp(floor)
            misfit, log_det, values = self._summed(engines, kappa, ratio)
            if not misfit > 0:  # lost to rounding, where a parallel field has nearly no prior precision
                return math.inf
            # -log p(y) with the amplitude at its best, misfit / values, for this ratio of noise to amplitude
            amplitude = misfit / values if learn_noise else noise / ratio
            penalty = (floor - x[1]) ** 2 + 0.5 * ((x[0] - centre) / self.prior_scale) ** 2
            if learn_noise:
                level = torch.tensor(math.log(amplitude * ratio), dtype=torch.float64)
                penalty -= float(self.noise_prior(level))
            return penalty + 0.5 * (misfit / amplitude + values * math.log(2 * math.pi * amplitude) + log_det)

        begin = np.array([centre, float((self.log_noise - self.log_amplitude).detach())])
        simplex = begin + np.array([[0.0, 0.0], [0.7, 0.0], [0.0, -1.5]])
        options = {"maxfev": max(steps, 60), "xatol": 0.05, "fatol": 0.05, "initial_simplex": simplex}
        log_kappa, log_ratio = minimize(cost, begin, method="Nelder-Mead", options=options).x
        log_ratio = max(log_ratio, _LEAST_LOG_RATIO)
        misfit, _, values = self._summed(engines, math.exp(log_kappa), math.exp(log_ratio))
        amplitude = misfit / values if learn_noise else noise / math.exp(log_ratio)
        with torch.no_grad():
            self.log_lengthscale.fill_(log_kappa)
            self.log_amplitude.fill_(math.log(amplitude))
            self.log_noise.fill_(math.log(amplitude) + log_ratio)

    def share(self, other: PlainEngine) -> None:
        """Take amplitude, noise and length scale of another engine, as the same parameters."""
        first = cast(PrecisionEngine, other)
        self.log_amplitude, self.log_noise = first.log_amplitude, first.log_noise
        self.log_lengthscale = first.log_lengthscale

    # ---------------------------------------------------------------------------------------- posterior

    def condition(self) -> None:
        """Factorise the posterior precision, and solve for the mean of the unknowns."""
        prior, _ = self._prior(self.lengthscale)
        self._precision = (
            prior / float(self.amplitude.detach()) + self._gram / float(self.noise.detach())
        ).tocsc()
        self._factor = factorise(self._precision)
        self._mean = self._factor.solve(self._cross / float(self.noise.detach()))

    def _as_tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=self.cloud.device)

    def mean(self, sites: Sites) -> Tensor:
        """Return the mean of the unknowns as read at the sites, ``(B, q, m)``."""
        return self._as_tensor(self._components(self._tie(sites) @ self._mean).transpose(2, 0, 1))

    def covariance(self, sites: Sites) -> Tensor:
        """Return posterior covariances ``(q, m, m)``, by one sparse solve per row."""
        return self._as_tensor(self._covariances(self._factor, sites))

    def _covariances(self, factor: Any, sites: Sites) -> np.ndarray:
        """Return the covariances ``(q, m, m)`` at sites under the precision that was factorised."""
        return self._covariances_of(factor, self._tie(sites))

    def _covariances_of(self, factor: Any, sees: sp.csr_matrix) -> np.ndarray:
        """Return the covariances ``(q, m, m)`` of linear forms of the unknowns, m rows each."""
        m = self.pencil.fibre
        per = 1 if self.pencil.paired else m
        total = sees.shape[0] // per
        out = np.empty((total, m, m))
        step = max(1, _BLOCK // per)
        for start in range(0, total, step):
            part = sees[start * per : (start + step) * per]
            # H Q⁻¹ H' of a block of rows, of which the blocks on the diagonal are kept
            half = factor.solve(np.ascontiguousarray(part.conj().T.toarray()))
            block = part @ half
            if self.pencil.paired:
                out[start : start + step] = block.diagonal().real[:, None, None] * np.eye(2)
            else:
                q = len(block) // m
                out[start : start + step] = block.reshape(q, m, q, m)[np.arange(q), :, np.arange(q)]
        return out

    def missing_variance(self, sites: Sites) -> Tensor:
        """Return what reading the nodes leaves out of the prior at the sites, ``(q,)``."""
        if sites.are_nodes:
            return torch.zeros(len(sites), dtype=torch.float64, device=self.cloud.device)
        factor = factorise(self._prior(self.lengthscale)[0])
        nodes = sites.nodes.unique().cpu()
        at_nodes = torch.ones(len(self.cloud), dtype=torch.float64)
        if len(nodes) <= _EXACT_VARIANCES:
            at_nodes[nodes] = self._component_variances(factor, self._tie(self.cloud.sites(nodes)))
        else:
            # one solve per draw in place of one per node
            draw = Normals(torch.Generator().manual_seed(0), self.pencil.paired)
            fields = self._components(factor.solve(self._root_draws(draw, _DRAWS)) / self._half_mass[:, None])
            at_nodes = torch.as_tensor((fields**2).mean((1, 2)))
        itself, levels = self.cloud.left_out
        own = self._tie(itself)
        found = [self._component_variances(factor, (own - self._tie(read)).tocsr()) for read in levels]
        rough, noise = variogram(levels, found)
        lost = lost_variance(sites, at_nodes.to(self.cloud.device), float(rough), float(noise))
        return float(self.amplitude.detach()) * lost

    def _component_variances(self, factor: Any, sees: sp.csr_matrix) -> Tensor:
        """Return variances of a component of linear forms of the unknowns, averaged over components, ``(q,)``."""
        found = self._covariances_of(factor, sees)
        return torch.as_tensor(found.trace(axis1=1, axis2=2) / found.shape[1])

    def _root_draws(self, draw: Normals, count: int) -> np.ndarray:
        """Draw columns whose covariance is the prior precision at amplitude 1."""
        shift = 2.0 * self.nu / self.lengthscale**2
        # H^ν = H^((ν-1)/2) H H^((ν-1)/2), or for even ν the square of H^(ν/2)
        if self.nu % 2 == 0:
            columns = draw((self._operator.shape[0], count))
        else:
            columns = root_sample(self.cloud, self.pencil, shift, count, draw)
        base = (self._operator + shift * self._identity).tocsc()
        for _ in range(self.nu // 2):
            columns = base @ columns
        return np.asarray(columns * math.sqrt(self.density(shift, self.nu)))

    def sample(self, n: int, sites: Sites, generator: torch.Generator | None) -> Tensor:
        """Draw by perturbing prior and data, and one solve (Papandreou and Yuille, 2010), ``(n, B, q, m)``."""
        fields = self._y.shape[1]
        draw = Normals(generator, self.pencil.paired)
        noise, amplitude = float(self.noise.detach()), float(self.amplitude.detach())
        # A draw of N(0, posterior) solves (Q + H'R⁻¹H/τ²) z = Q^½ ε₁ + H'R^-½ ε₂ / τ.
        total = self._root_draws(draw, n * fields) / math.sqrt(amplitude)
        scaled = sp.diags(1.0 / np.sqrt(self._relative * noise)) @ self._sees
        total = total + scaled.conj().T @ draw((self._sees.shape[0], n * fields))
        values = self._tie(sites) @ (self._factor.solve(total) + np.tile(self._mean, (1, n)))
        return self._as_tensor(
            self._components(values).reshape(len(sites), -1, n, fields).transpose(2, 3, 0, 1)
        )


def _log_det(factor: Any) -> float:
    """Log-determinant of a positive definite matrix from SuperLU's factors."""
    return float(np.log(np.abs(factor.U.diagonal())).sum())
