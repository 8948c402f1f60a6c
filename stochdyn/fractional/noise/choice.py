"""The noise of a model that fixes its own grid: fractional with a learnt index, Brownian, or any process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_hurst, check_positive_int
from stochdyn.core.sde.noise import Brownian, NoiseProcess
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.fractional.noise.markov import MarkovNoise
from stochdyn.fractional.noise.moments import Kind

__all__ = ["FractionalNoise", "as_noise"]


@dataclass(frozen=True)
class FractionalNoise:
    """Fractional noise for a model that chooses horizon and step itself, such as :class:`LatentSDE` or :class:`VideoModel`.

    Use it to say where the Hurst index starts or to keep it fixed. For an equation of your own take :class:`MarkovNoise`, which this
    becomes once the grid is known.

    Attributes:
        hurst: The Hurst index at the start, between 0 and 1: a number, or one per latent component where the model takes several.
        learn_hurst: Whether the index is a parameter of the model.
        kind: The type of the noise: ``"II"`` for noise that starts with the grid, ``"I"`` for stationary increments with an infinite past.
        num_states: The number of memory states per noise channel; None for as many as :class:`MarkovNoise` takes, with which a
            learnt index isn't biased.

    Raises:
        HurstRangeError: If an index lies outside (0, 1).
        InvalidInputError: If another option makes no sense.

    Example:
        >>> FractionalNoise(0.7, kind="I").process(horizon=2.0, dt=0.1).kind
        'I'
    """

    hurst: float | Tensor = 0.5
    learn_hurst: bool = True
    kind: Kind = "II"
    num_states: int | None = None

    def __post_init__(self) -> None:
        check_hurst(self.hurst)
        check_bool(self.learn_hurst, "learn_hurst")
        check_choice(self.kind, ("I", "II"), "kind")
        if self.num_states is not None:
            check_positive_int(self.num_states, "num_states")

    def process(self, horizon: float, dt: float, channels: int | None = None) -> MarkovNoise:
        """Return the noise process on a grid.

        Args:
            horizon: The length of time that the noise covers.
            dt: The smallest time step that matters.
            channels: The number of noise channels with an index of their own; None for one index in all channels.

        Raises:
            ShapeError: If there are several indices, and not one per channel.
        """
        index: float | Tensor = self.hurst
        if channels is not None:
            index = torch.as_tensor(index, dtype=torch.get_default_dtype())
            if index.shape not in ((), (1,), (channels,)):
                raise ShapeError(
                    "hurst must be one number, or one per component",
                    got=f"shape {tuple(index.shape)}",
                    expected=f"({channels},)",
                )
            index = index.expand(channels).clone()
        elif isinstance(index, Tensor) and index.numel() != 1:
            raise ShapeError("hurst must be one number here", got=f"shape {tuple(index.shape)}")
        return MarkovNoise(
            index,
            self.num_states,
            horizon,
            dt,
            self.kind,
            learn_hurst=self.learn_hurst,
            per_channel=channels is not None,
        )


def as_noise(noise: object, horizon: float, dt: float, channels: int | None = None) -> NoiseProcess:
    """Return the process that ``noise`` stands for: an object or a name; see :meth:`FractionalNoise.process` for the others.

    Raises:
        InvalidInputError: If it is neither a noise nor the name of one.
    """
    if isinstance(noise, NoiseProcess):
        return noise
    if isinstance(noise, FractionalNoise):
        return noise.process(horizon, dt, channels)
    if not isinstance(noise, str):
        raise InvalidInputError(
            "noise must be a noise process or the name of one",
            got=repr(noise)[:60],
            expected="FractionalNoise(...) | a NoiseProcess | 'fractional' | 'brownian'",
        )
    check_choice(noise, ("fractional", "brownian"), "noise")
    return Brownian() if noise == "brownian" else FractionalNoise().process(horizon, dt, channels)
