"""A score from a network that predicts data, in units in which every noise level looks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_callable,
    check_finite,
    check_nonempty,
    check_real,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.interpolants.fields.networks import FieldNetwork, Network
from stochdyn.interpolants.paths.processes import AffineProcess, check_process

__all__ = ["PreconditionedScore"]


class PreconditionedScore(nn.Module):
    r"""A score whose network predicts data, preconditioned by the spread S of the data about the mean of the process.

    .. math::
        s(t,x)=-\frac{y}{\sqrt{V_t}}+\frac{a_tS}{\sigma_t\sqrt{V_t}}\,N_\theta(\tau,y),\qquad
        y=\frac{x-\mu}{\sqrt{V_t}},\qquad V_t=a_t^2S^2+\sigma_t^2

    It is the score of a Gaussian of spread S plus a correction, and the prediction of the data is

    .. math::
        E[x_0\mid X_t=x]=\mu+\frac{a_tS^2}{\sqrt{V_t}}\,y+\frac{\sigma_tS}{\sqrt{V_t}}\,N_\theta .

    What the network sees and what it is to return have unit size at every noise level; :math:`\tau` is the log signal-to-noise ratio,
    scaled to [-1, 1]. A network that predicts the noise must instead pass the noise on to great precision where there is little of it.

    :class:`ScoreMatching` by default weighs the error of such a score so that errors of N count alike at every noise level, see
    :meth:`weight`. With the weight of the noise's error, what the data look like in the large, which is decided where there is
    little but noise, hardly counts: a restoration then falls behind a plain regression.

    Args:
        process: The noising process. Where every item has a mean of its own, as in restoration, y is about that.
        network: The network ``net(tau, y)`` or ``net(tau, y, condition)``, with ``tau (n, 1)``, such as a :class:`FieldNetwork`.
        data_scale: The root mean square S of the data about the mean of the process.

    Raises:
        InvalidInputError: If the network isn't callable, or the spread isn't positive.

    Example:
        >>> from stochdyn.interpolants import VP
        >>> score = PreconditionedScore.from_data(VP(), torch.randn(100, 2))
        >>> score(torch.full((5, 1), 0.5), torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference:
        Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, section 5 and table 1.
    """

    data_scale: Tensor

    def __init__(self, process: AffineProcess, network: Network, data_scale: float) -> None:
        super().__init__()
        check_process(process)
        check_callable(network, "network", "a network, net(tau, y)")
        check_real(data_scale, "data_scale", above=0.0)
        # not registered: what a process learns isn't the score's to train
        self._process, self.network = (process,), network
        self.register_buffer("data_scale", torch.tensor(float(data_scale)))

    @classmethod
    def from_data(
        cls,
        process: AffineProcess,
        x1: Any,
        mean: Any = None,
        width: int = 128,
        depth: int = 4,
        *,
        condition_dim: int = 0,
        num_classes: int = 0,
        skips: bool = False,
    ) -> PreconditionedScore:
        """Return a score with a :class:`FieldNetwork`, and with the spread that data have.

        Args:
            process: The noising process.
            x1: The data, ``(n, d)``.
            mean: What the process reverts to, ``(n, d)``, where every item has its own.
            width: The width of the hidden layers.
            depth: The number of hidden layers.
            condition_dim: The number of components of a context vector; 0 for none.
            num_classes: The number of labels, given as integers; 0 for none.
            skips: Whether hidden layers add to what came before.

        Raises:
            ShapeError, EmptyDataError, NonFiniteError: If the data aren't ``(n, d)``, or the means don't fit.
        """
        check_process(process)
        x1 = as_tensor(x1, "x1", 2, "(n, d)")
        check_nonempty(x1, "x1")
        about = process if mean is None else process.with_mean(as_tensor(mean, "mean", like=x1))
        spread = (x1 - about.center(x1)).square().mean().sqrt()
        check_finite(spread, "x1")
        network = FieldNetwork(
            x1.shape[-1], width, depth, condition_dim=condition_dim, num_classes=num_classes, skips=skips
        )
        return cls(process, network.to(x1), float(spread))

    @property
    def process(self) -> AffineProcess:
        """The noising process."""
        return self._process[0]

    def forward(self, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Return the score ``(..., d)`` at ``x (..., d)``, for ``t (..., 1)``."""
        return self.about(self.process, t, x, condition)

    def about(self, process: AffineProcess, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Return the score for the same process with other means."""
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
        a, variance, size = process.scale(time), process.variance(time), self.data_scale.to(x.dtype)
        root = (a.square() * size.square() + variance).sqrt()
        y = (x - process.center(x)) / root
        tau = self._level(time)
        value = self.network(tau, y) if condition is None else self.network(tau, y, condition)
        return (a * size / variance.sqrt() * value - y) / root

    def weight(self, t: Tensor) -> Tensor:
        r"""Return the weight of the squared error of the score with which errors of the network count alike at all times.

        .. math:: w(t)=\frac{\sigma_t^2\,V_t}{a_t^2S^2}
        """
        signal = self.process.scale(t).square() * self.data_scale.to(t.dtype).square()
        noise = self.process.variance(t)
        return noise * (signal + noise) / signal

    def _level(self, time: Tensor) -> Tensor:
        """Return the log signal-to-noise ratio, -1 at the horizon and 1 at the start."""
        ends = torch.tensor([self.process.horizon, self.process.start], dtype=time.dtype, device=time.device)
        low, high = self.process.log_snr(ends)
        return 2 * (self.process.log_snr(time) - low) / (high - low) - 1


class About(nn.Module):
    """A preconditioned score for a process with other means."""

    def __init__(self, score: PreconditionedScore, process: AffineProcess) -> None:
        super().__init__()
        self.score, self._process = score, (process,)

    def forward(self, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Return the score ``(..., d)`` at ``x (..., d)``."""
        return self.score.about(self._process[0], t, x, condition)
