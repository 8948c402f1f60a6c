"""Processes and mixtures whose noised laws are known."""

from __future__ import annotations

import torch

from stochdyn.interpolants import OU, VE, VP, AffineProcess, MeanReverting, NoisedMixture

F64 = torch.float64


def processes() -> dict[str, AffineProcess]:
    """One of each kind, in double precision."""
    kinds = {
        "ou": OU(rate=0.7, diffusion=1.3, horizon=4.0, start=0.01),
        "vp": VP(start=0.01),
        "ve": VE(0.05, 5.0, start=0.05),
        "reverting": MeanReverting(torch.tensor([0.5, -1.0]), spread=0.8, start=0.01),
    }
    return {name: process.double() for name, process in kinds.items()}


def mixture(process: AffineProcess, d: int = 2, seed: int = 0) -> NoisedMixture:
    """Three components with full covariances."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(3, d, d, dtype=F64, generator=g) / d**0.5
    means = 2 * torch.randn(3, d, dtype=F64, generator=g)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    return NoisedMixture(process, weights, means, root @ root.mT + 0.05 * torch.eye(d, dtype=F64))


def gaussian(process: AffineProcess, d: int = 2) -> NoisedMixture:
    """One Gaussian, for which everything is in closed form."""
    mean = torch.linspace(1.3, -0.4, d, dtype=F64)[None]
    return NoisedMixture(process, torch.ones(1, dtype=F64), mean, torch.full((1,), 0.2, dtype=F64))
