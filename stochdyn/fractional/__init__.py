"""Fractional noise: Markov-approximate and exact fractional Brownian motion, and inference with both."""

from __future__ import annotations

from stochdyn.fractional.affine_drift import AffineDrift
from stochdyn.fractional.exact import (
    fbm_covariance,
    fgn_autocovariance,
    fou_autocovariance,
    sample_fbm,
    sample_fgn,
)
from stochdyn.fractional.fgn import FractionalGaussianNoise
from stochdyn.fractional.gaussian import GaussianPosterior
from stochdyn.fractional.gaussian_elbo import GaussianELBO
from stochdyn.fractional.hurst import infer_hurst
from stochdyn.fractional.hurst_guide import HurstGuide, hurst_model
from stochdyn.fractional.likelihood import FGNFit, HurstLikelihood, fit_fgn, hurst_log_likelihood
from stochdyn.fractional.linear import FractionalOU, FractionalOUPosterior
from stochdyn.fractional.noise import MarkovNoise, default_speeds
from stochdyn.fractional.rough_volatility import RoughVolatility, rough_volatility
from stochdyn.fractional.roughness import averaged_autocovariance, infer_roughness, roughness_model
from stochdyn.fractional.video import EncodedVideo, VideoModel
from stochdyn.fractional.weights import (
    cross_moments,
    geometric_speeds,
    gram_matrix,
    optimal_weights,
    variance_constant,
)

__all__ = [
    "AffineDrift",
    "EncodedVideo",
    "FGNFit",
    "FractionalGaussianNoise",
    "FractionalOU",
    "FractionalOUPosterior",
    "GaussianELBO",
    "GaussianPosterior",
    "HurstGuide",
    "HurstLikelihood",
    "MarkovNoise",
    "RoughVolatility",
    "VideoModel",
    "averaged_autocovariance",
    "cross_moments",
    "default_speeds",
    "fbm_covariance",
    "fgn_autocovariance",
    "fit_fgn",
    "fou_autocovariance",
    "geometric_speeds",
    "gram_matrix",
    "hurst_log_likelihood",
    "hurst_model",
    "infer_hurst",
    "infer_roughness",
    "optimal_weights",
    "rough_volatility",
    "roughness_model",
    "sample_fbm",
    "sample_fgn",
    "variance_constant",
]
