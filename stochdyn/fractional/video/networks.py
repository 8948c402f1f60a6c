"""Networks of the latent video model: frames to features, features to contexts, states back to frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import check_positive_int
from stochdyn.core.networks import MLP
from stochdyn.errors import InvalidInputError

__all__ = ["ContextEncoder", "FrameDecoder", "FrameEncoder", "JointControl", "VideoNetworks"]


@dataclass(frozen=True)
class VideoNetworks:
    """The sizes of the networks of a :class:`VideoModel`.

    Attributes:
        latents: The number of components of the latent state.
        content: The number of components of the content, the part of a video that doesn't move.
        features: The number of components of a frame's features.
        widths: The channels of the convolutions, one per halving of the frame; frames shrink to 4 x 4.
        hidden: The widths of the hidden layers of the drift and of the control.
        diffusion_width: The number of hidden units per component of the state-dependent diffusion; 0 for a constant one.

    Raises:
        InvalidInputError: If a size isn't a positive integer.

    Example:
        >>> VideoNetworks(latents=2).features
        64
    """

    latents: int = 4
    content: int = 64
    features: int = 64
    widths: Sequence[int] = (16, 32, 64)
    hidden: Sequence[int] = (100, 100)
    diffusion_width: int = 8

    def __post_init__(self) -> None:
        for name in ("latents", "content", "features"):
            check_positive_int(getattr(self, name), name)
        check_positive_int(self.diffusion_width, "diffusion_width", 0)
        for name in ("widths", "hidden"):
            sizes = getattr(self, name)
            if not isinstance(sizes, tuple | list):
                raise InvalidInputError(f"{name} must be the widths of layers", got=repr(sizes)[:60])
            for width in sizes:
                check_positive_int(width, name)

    @classmethod
    def paper(cls) -> VideoNetworks:
        """Return the sizes of the published experiment, for frames of 64 x 64 pixels.

        Example:
            >>> VideoNetworks.paper().latents
            6
        """
        return cls(latents=6, widths=(64, 128, 256, 256), hidden=(200, 200))


def _groups(channels: int) -> int:
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


def _side_by_side(module: nn.Sequential) -> nn.Sequential:
    """Store weights with channels next to each other: convolutions are then twice as fast on the CPU."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class FrameEncoder(nn.Module):
    """A frame to a vector of features: blocks of convolution, pooling by two, normalisation and SiLU.

    Args:
        size: The height and width of a frame in pixels, ``4 * 2**len(widths)``.
        channels: The number of colours.
        widths: The channels of the blocks.
        features: The number of components of the result.
    """

    def __init__(self, size: int, channels: int, widths: Sequence[int], features: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for a, b in pairwise((channels, *widths)):
            blocks += [nn.Conv2d(a, b, 3, padding=1), nn.MaxPool2d(2), nn.GroupNorm(_groups(b), b), nn.SiLU()]
        self.blocks = _side_by_side(nn.Sequential(*blocks))
        side = size >> len(widths)
        self.head = nn.Linear(widths[-1] * side * side, features)

    def forward(self, frames: Tensor) -> Tensor:
        """Return features ``(*batch, features)`` of frames ``(*batch, channels, size, size)``."""
        flat = frames.reshape(-1, *frames.shape[-3:]).contiguous(memory_format=torch.channels_last)
        return self.head(self.blocks(flat).flatten(1)).reshape(*frames.shape[:-3], -1)


class FrameDecoder(nn.Module):
    """A vector to a frame with values in (0, 1), the mirror image of :class:`FrameEncoder`."""

    def __init__(self, size: int, channels: int, widths: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.side = size >> len(widths)
        self.head = nn.Linear(inputs, widths[-1] * self.side**2)
        blocks: list[nn.Module] = []
        for a, b in pairwise((*widths[::-1], channels)):
            blocks += [nn.GroupNorm(_groups(a), a), nn.SiLU(), nn.ConvTranspose2d(a, b, 4, 2, 1)]
        self.blocks = _side_by_side(nn.Sequential(*blocks))

    def forward(self, code: Tensor) -> Tensor:
        """Return frames ``(*batch, channels, size, size)`` for codes ``(*batch, inputs)``."""
        flat = self.head(code.reshape(-1, code.shape[-1]))
        small = flat.unflatten(-1, (-1, self.side, self.side)).contiguous(memory_format=torch.channels_last)
        image = torch.sigmoid(self.blocks(small))
        return image.reshape(*code.shape[:-1], *image.shape[1:])


class ContextEncoder(nn.Module):
    """Features of all frames to the content of the video, the law of its start, and a context for every frame.

    The content is a function of the componentwise median of the features over time, so that it doesn't depend on
    their order. The start is read off the features of the first three frames. Contexts are two convolutions
    over time of width three.

    Args:
        features: The number of components of a frame's features.
        content: The number of components of the content.
        latents: The number of components of the latent state.
    """

    def __init__(self, features: int, content: int, latents: int) -> None:
        super().__init__()
        self.content = MLP((features, content, content), activation="silu")
        self.start = MLP((3 * features, features, 2 * latents), activation="silu")
        self.over_time = nn.Sequential(
            nn.Conv1d(features, features, 3, padding=1),
            nn.SiLU(),
            nn.Conv1d(features, features, 3, padding=1),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return content ``(batch, content)``, mean and deviation of the start ``(batch, latents)``, and contexts.

        Args:
            features: The features ``(batch, time, features)`` of all frames. Contexts are ``(time, batch, features)``, time leading.
        """
        content = self.content(features.median(1).values)
        mean, raw = self.start(features[:, :3].flatten(1)).chunk(2, -1)
        context = self.over_time(features.mT).permute(2, 0, 1)
        return content, mean, F.softplus(raw) + 1e-3, context


class JointControl(nn.Module):
    """Drift and extra precision of the driving noise by one network of state, memory and context; zero at first.

    Args:
        state_size: The number of components of the state with its memory.
        channels: The number of components of the noise.
        context: The number of components of the context.
        hidden: The widths of the hidden layers.
        dt: The time between the frames that the contexts belong to.
    """

    #: The precision starts small, and can become large where the data say so.
    _OFFSET = -2.0

    def __init__(
        self, state_size: int, channels: int, context: int, hidden: Sequence[int], dt: float
    ) -> None:
        super().__init__()
        self.network = MLP((state_size + context, *hidden, 2 * channels), zero_last=True)
        self.dt = dt

    def forward(self, t: Tensor, z: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Return drift and precision, ``(..., m)`` each.

        Args:
            t: The time, without axes or broadcastable to ``z[..., :1]``.
            z: The states ``(..., batch, Z)``.
            contexts: The contexts ``(time, batch, context)`` of the frames, interpolated linearly.
        """
        position = (t / self.dt).clamp(0, contexts.shape[0] - 1)
        before = position.floor().clamp(max=max(contexts.shape[0] - 2, 0))
        share = (position - before).to(z.dtype)
        first = before.long()
        second = (first + 1).clamp(max=contexts.shape[0] - 1)
        if t.ndim:  # time leads: (T, 1, ..., 1)
            shape = (t.shape[0], *(1,) * (z.ndim - 3), *contexts.shape[1:])
            low, high = contexts[first.flatten()].reshape(shape), contexts[second.flatten()].reshape(shape)
        else:
            low, high = (contexts.index_select(0, i.reshape(1)).squeeze(0) for i in (first, second))
        context = torch.lerp(low, high, share).expand(*z.shape[:-1], -1)
        drift, precision = self.network(torch.cat([z, context], -1)).chunk(2, -1)
        return drift, F.softplus(precision + self._OFFSET)
