"""The latent video SDE: frames decoded from a content and a path driven by fractional or Brownian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from stochdyn._caching import cached
from stochdyn._checks import check_ndim, check_positive, check_positive_int, check_type
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.networks import StateNetwork
from stochdyn.core.sde.control import Control
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.noise import NoiseProcess
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError
from stochdyn.fractional.latent.networks import ConstantDiffusion, StateDiffusion
from stochdyn.fractional.noise.choice import FractionalNoise, as_noise
from stochdyn.fractional.noise.markov import MarkovNoise
from stochdyn.fractional.video.networks import (
    ContextEncoder,
    FrameDecoder,
    FrameEncoder,
    JointControl,
    VideoNetworks,
)
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["EncodedVideo", "VideoModel"]

_SLACK = 1e-3  # of pixels beyond [0, 1], as resampling leaves


@cached(64)
def _grid(num_steps: int, dt: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a solver's grid; the same tensor every time, so that what is known of it needn't be asked again."""
    return torch.arange(num_steps + 1, device=device).to(dtype) * dt


@dataclass(frozen=True)
class EncodedVideo:
    """What the encoder says of a batch of videos.

    Attributes:
        content: The content ``(batch, content)`` of each video, which doesn't move.
        start: The law of the latent start, of batch shape ``(batch,)`` and event shape ``(latents,)``.
        contexts: The contexts ``(time, batch, features)`` that the control reads.
    """

    content: Tensor
    start: Independent
    contexts: Tensor


class _VideoControl(Control):
    """The control of one batch of videos; from ``until`` on the noise is left to the prior."""

    def __init__(self, joint: JointControl, contexts: Tensor, until: float = math.inf) -> None:
        super().__init__(lambda t, z: self.at(t, z)[0], lambda t, z: self.at(t, z)[1])
        self.joint, self.contexts, self.until = joint, contexts, until

    def at(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return drift and precision, which come out of one network; see :meth:`Control.at`."""
        drift, precision = self.joint(t, z, self.contexts)
        if math.isinf(self.until):
            return drift, precision
        watched = t < self.until
        return drift * watched, precision * watched


class VideoModel(Objective):
    r"""A video as a static content and a latent SDE path, with a variational posterior; minus its evidence bound.

    .. math::
        X_0\sim N(0,I),\quad dX=b(X)\,dt+\sigma(X)\,dB^H,\qquad
        o_i\sim N(\mathrm{decode}(X_{t_i}, w),\ s^2 I),

    with networks for drift, diffusion and decoder, and one Hurst index, learned with them. The posterior encodes
    the frames into the content :math:`w` (a point estimate), the law of :math:`X_0`, and a control of the noise with a
    variance of its own in every step, so that the bound doesn't pay for the size of the time step. The objective is the mean over
    the batch of

    .. math:: -\mathrm{ELBO}=-\mathbb E_Q\Big[\sum_i\log N(o_i;\mathrm{decode}(X_{t_i},w),s^2)\Big]+\mathrm{KL}(Q\,\|\,P).

    Args:
        num_frames: The number of frames of the longest video or prediction, which sets the horizon of the noise.
        size: The height and width of a frame in pixels, a power of two, at least 16.
        channels: The number of colours.
        noise: What drives the path: ``"fractional"``, with one Hurst index that is learnt from 1/2 on; ``"brownian"``; a
            :class:`FractionalNoise` with options of its own; or any noise process.
        networks: The sizes of the networks, by default those for 32 x 32 pixels on a processor.
        dt: The time between frames.
        num_steps: The number of solver steps between frames.
        obs_scale: The standard deviation s of a pixel; :math:`\sqrt{1/2}` makes minus the log-likelihood the sum of squared errors, up to a constant.
        num_particles: The number of paths per video in each estimate of the bound.

    Example:
        >>> from stochdyn.datasets import moving_digits
        >>> from stochdyn.fractional import VideoNetworks
        >>> videos = moving_digits(2, num_frames=4, size=16)
        >>> sizes = VideoNetworks(latents=2, content=8, features=8, widths=(4, 8), hidden=(16,))
        >>> model = VideoModel(4, size=16, networks=sizes)
        >>> value = model(videos)
        >>> value.bound, model.reconstruct(videos).shape
        ('evidence_lower', torch.Size([2, 4, 1, 16, 16]))

    Reference:
        R. Daems, M. Opper, G. Crevecoeur and T. Birdal, Variational inference for SDEs driven by fractional
        noise, ICLR 2024. The variance of the noise increments is an addition.
    """

    def __init__(
        self,
        num_frames: int = 16,
        size: int = 32,
        channels: int = 1,
        *,
        noise: Literal["fractional", "brownian"] | FractionalNoise | NoiseProcess = "fractional",
        networks: VideoNetworks | None = None,
        dt: float = 0.1,
        num_steps: int = 3,
        obs_scale: float = math.sqrt(0.5),
        num_particles: int = 1,
    ) -> None:
        super().__init__()
        check_positive_int(num_frames, "num_frames", 3)
        for name, value in (
            ("size", size),
            ("channels", channels),
            ("num_steps", num_steps),
            ("num_particles", num_particles),
        ):
            check_positive_int(value, name)
        networks = VideoNetworks() if networks is None else networks
        check_type(networks, VideoNetworks, "networks")
        widths, hidden, latents = networks.widths, networks.hidden, networks.latents
        check_positive(dt, "dt")
        check_positive(obs_scale, "obs_scale")
        if size >> len(widths) != 4 or size != 4 << len(widths):
            raise InvalidInputError(
                "every width halves the frame, down to 4 x 4",
                got=f"size={size} and {len(widths)} widths",
                expected=f"{max(1, (size // 4).bit_length() - 1)} widths, and a size that is a power of two",
            )
        self.num_frames, self.size, self.channels = num_frames, size, channels
        self.dt, self.num_steps = dt, num_steps
        self.obs_scale = obs_scale
        self.latents, self.num_particles = latents, num_particles
        self.encoder = FrameEncoder(size, channels, widths, networks.features)
        self.contexts = ContextEncoder(networks.features, networks.content, latents)
        self.decoder = FrameDecoder(size, channels, widths, latents + networks.content)
        self.noise = as_noise(noise, num_frames * dt, dt / num_steps)
        wide = networks.diffusion_width
        strength = StateDiffusion(latents, wide) if wide else ConstantDiffusion(latents)
        self.equation = SDE(StateNetwork(latents, hidden=hidden, time=False), strength, self.noise)
        size_z = latents * (1 + self.noise.num_states)
        self.control = JointControl(size_z, latents, networks.features, hidden, dt)

    @classmethod
    def paper(
        cls, noise: Literal["fractional", "brownian"] | FractionalNoise | NoiseProcess = "fractional"
    ) -> VideoModel:
        """Return the model of the published experiment: 25 frames of 64 x 64 pixels, for a GPU.

        Args:
            noise: What drives the path, as for the constructor.

        Example:
            >>> model = VideoModel.paper()
            >>> model.size, model.num_frames
            (64, 25)
        """
        return cls(25, 64, noise=noise, networks=VideoNetworks.paper())

    @property
    def hurst(self) -> Tensor | None:
        """The Hurst index, or None for Brownian noise."""
        return self.noise.hurst if isinstance(self.noise, MarkovNoise) else None

    def grid(self, num_frames: int, device: torch.device | None = None) -> Tensor:
        """Return the solver's grid for so many frames, ``((num_frames - 1) * num_steps + 1,)``."""
        device = torch.get_default_device() if device is None else device
        num_steps, dt = (num_frames - 1) * self.num_steps, self.dt / self.num_steps
        return _grid(num_steps, dt, device, torch.get_default_dtype())

    def encode(self, frames: Tensor) -> EncodedVideo:
        """Return content, law of the start and contexts of videos.

        Args:
            frames: The videos ``(batch, time, channels, size, size)``, at least three frames each: uint8, or floats in [0, 1].
        """
        return self._encode(self._pixels(frames))

    def _encode(self, pixels: Tensor) -> EncodedVideo:
        content, mean, deviation, contexts = self.contexts(self.encoder(pixels))
        return EncodedVideo(content, Independent(Normal(mean, deviation), 1), contexts)

    def prior(self, like: Tensor) -> DiffusionMeasure:
        """Return the law P of latent paths, of the precision and device of ``like``."""
        zero = like.new_zeros(self.latents)
        return DiffusionMeasure(Independent(Normal(zero, torch.ones_like(zero)), 1), self.equation)

    def posterior(self, encoded: EncodedVideo, until: float = math.inf) -> DiffusionMeasure:
        """Return the law Q of latent paths given videos; from the time ``until`` on it follows the prior."""
        control = _VideoControl(self.control, encoded.contexts, until)
        return DiffusionMeasure(encoded.start, self.equation.with_control(control))

    def forward(self, batch: Tensor | Sequence[Tensor] | None = None) -> ObjectiveValue:
        """Evaluate minus the evidence bound of a batch of videos, as a mean over the batch.

        Args:
            batch: The videos ``(batch, time, channels, size, size)``.
        """
        if batch is None:
            raise InvalidInputError("the video model needs a batch of videos")
        frames = self._pixels(batch if isinstance(batch, Tensor) else batch[0])
        encoded = self._encode(frames)
        law = self.posterior(encoded)
        path = law.sample(self.grid(frames.shape[1], frames.device), (self.num_particles,))
        prior = self.prior(frames)
        divergence = law.log_rn(path, prior, "rate", recorded=True)
        decoded = self.decode(path.x[..., :: self.num_steps, :], encoded.content)
        squares = (decoded - frames).square().sum((-4, -3, -2, -1))
        pixels = frames[0].numel()
        constant = 0.5 * pixels * math.log(2 * math.pi * self.obs_scale**2)
        fit = squares / (2 * self.obs_scale**2)
        loss = (fit + divergence).mean() + constant
        terms = {
            "elbo": -loss.detach(),
            "squared_error": squares.detach().mean(),
            "kl": divergence.detach().mean(),
        }
        if self.hurst is not None:
            terms["hurst"] = self.hurst.detach().mean()
        return ObjectiveValue(loss, terms, "evidence_lower")

    def decode(self, x: Tensor, content: Tensor) -> Tensor:
        """Return frames ``(*sample, batch, time, channels, size, size)``.

        Args:
            x: The states ``(*sample, batch, time, latents)`` at the times of the frames.
            content: The content ``(batch, content)`` of each video.
        """
        wide = content.unsqueeze(-2).expand(*x.shape[:-1], content.shape[-1])
        return self.decoder(torch.cat([x, wide], -1))

    @torch.no_grad()
    def reconstruct(
        self, frames: Tensor, num_samples: int = 1, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Return the mean over posterior paths of the decoded frames, like ``frames`` but in [0, 1]."""
        encoded = self.encode(frames)
        grid = self.grid(frames.shape[1], encoded.content.device)
        path = self.posterior(encoded).sample(grid, (num_samples,), generator)
        return self.decode(path.x[..., :: self.num_steps, :], encoded.content).mean(0)

    @torch.no_grad()
    def predict(
        self,
        frames: Tensor,
        num_frames: int,
        num_samples: int = 1,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        """Continue videos: posterior paths through the frames given, the prior's own noise after them.

        Args:
            frames: The videos ``(batch, seen, channels, size, size)``, at least three frames each.
            num_frames: The number of frames of the result, those given included.
            num_samples: The number of continuations of each video.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(num_samples, batch, num_frames, channels, size, size)`` in [0, 1].

        Raises:
            InvalidInputError: If there is nothing to predict, or more than the horizon of the noise.
        """
        seen = frames.shape[1]
        if not seen < num_frames <= self.num_frames:
            raise InvalidInputError(
                "can't predict this many frames",
                got=f"num_frames={num_frames} after {seen}",
                expected=f"{seen + 1} to {self.num_frames}",
                hint="num_frames of the model sets the horizon of its noise",
            )
        encoded = self.encode(frames)
        until = (seen - 1) * self.dt - 1e-6 * self.dt
        law = self.posterior(encoded, until)
        path = law.sample(self.grid(num_frames, encoded.content.device), (num_samples,), generator)
        return self.decode(path.x[..., :: self.num_steps, :], encoded.content)

    def _pixels(self, frames: Tensor) -> Tensor:
        check_ndim(frames, 5, "frames", "(batch, time, channels, size, size)")
        if frames.shape[2:] != (self.channels, self.size, self.size) or frames.shape[1] < 3:
            raise ShapeError(
                "the videos don't fit the model",
                got=f"shape {tuple(frames.shape)}",
                expected=f"(batch, 3 frames or more, {self.channels}, {self.size}, {self.size})",
            )
        if frames.shape[1] > self.num_frames:
            raise InvalidInputError(
                "the videos are longer than the horizon of the noise",
                got=f"{frames.shape[1]} frames",
                expected=f"at most {self.num_frames}",
                hint="build the model with a larger num_frames",
            )
        if frames.dtype == torch.uint8:
            return frames.to(self.control.network.layers[0].weight.dtype) / 255  # type: ignore[arg-type]
        if not frames.is_floating_point():
            raise InvalidInputError(
                "frames must be uint8, or floats in [0, 1]",
                got=frames.dtype,
                hint="use frames.to(torch.uint8)",
            )
        if not frames.requires_grad:
            low, high = (float(v) for v in frames.detach().aminmax())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise NonFiniteError("frames aren't finite")
            if low < -_SLACK or high > 1 + _SLACK:
                raise InvalidInputError(
                    "frames must be uint8, or floats in [0, 1]",
                    got=f"floats from {low:.3g} to {high:.3g}",
                    hint="divide by 255, or use frames.to(torch.uint8)",
                )
        return frames
