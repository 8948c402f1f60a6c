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
from stochdyn.fractional.latent import LatentSDE
from stochdyn.fractional.latent_analysis import (
    compare_models,
    evidence,
    forecast,
    posterior_paths,
    predict,
)
from stochdyn.fractional.likelihood import FGNFit, HurstLikelihood, fit_fgn, hurst_log_likelihood
from stochdyn.fractional.linear import FractionalOU, FractionalOUPosterior
from stochdyn.fractional.multifractional import (
    HurstCurve,
    MultifractionalNoise,
    multifractional_covariance,
)
from stochdyn.fractional.noise import MarkovNoise, default_speeds
from stochdyn.fractional.rough_volatility import RoughVolatility, rough_volatility
from stochdyn.fractional.roughness import averaged_autocovariance, infer_roughness, roughness_model
from stochdyn.fractional.series import Series
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
    "HurstCurve",
    "HurstGuide",
    "HurstLikelihood",
    "LatentSDE",
    "MarkovNoise",
    "MultifractionalNoise",
    "RoughVolatility",
    "Series",
    "VideoModel",
    "averaged_autocovariance",
    "compare_models",
    "cross_moments",
    "default_speeds",
    "evidence",
    "fbm_covariance",
    "fgn_autocovariance",
    "fit_fgn",
    "forecast",
    "fou_autocovariance",
    "geometric_speeds",
    "gram_matrix",
    "hurst_log_likelihood",
    "hurst_model",
    "infer_hurst",
    "infer_roughness",
    "multifractional_covariance",
    "optimal_weights",
    "posterior_paths",
    "predict",
    "rough_volatility",
    "roughness_model",
    "sample_fbm",
    "sample_fgn",
    "variance_constant",
]
