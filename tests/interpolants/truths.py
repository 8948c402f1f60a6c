"""Laws with known answers for the tests of interpolants."""

from __future__ import annotations

import torch

from stochdyn.interpolants import GaussianMixture, GaussianMixtureInterpolant, Interpolant

F64 = torch.float64
ALL_PATHS = ("linear", "trig", "encoder-decoder", "one-sided-linear", "one-sided-trig", "vp", "mirror")


def mixture(dim: int, count: int, seed: int, spread: float = 3.0, isotropic: bool = False) -> GaussianMixture:
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(count, dim, dtype=F64, generator=g)
    weights = torch.rand(count, dtype=F64, generator=g) + 0.2
    if isotropic:
        return GaussianMixture(weights / weights.sum(), means, 0.5)
    w = torch.randn(count, dim, dim, dtype=F64, generator=g)
    return GaussianMixture(weights / weights.sum(), means, w @ w.mT / dim + 0.5 * torch.eye(dim, dtype=F64))


def truth(path: str, dim: int, seed: int = 0, isotropic: bool = False) -> GaussianMixtureInterpolant:
    it = Interpolant(path)
    first = None if it.kind == "one-sided" or isotropic else mixture(dim, 2, seed)
    return GaussianMixtureInterpolant(it, first, mixture(dim, 3, seed + 1))


def fields_of(flow: GaussianMixtureInterpolant) -> tuple[str, ...]:
    it = flow.interpolant
    names = ["velocity", "path_velocity", "data_prediction"]
    if it.has_latent or it.kind == "one-sided":
        names += ["score", "noise_prediction"]
    return (*names, "start_prediction") if it.kind != "mirror" else tuple(names)
