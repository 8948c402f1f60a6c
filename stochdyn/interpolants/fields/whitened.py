"""Fields learnt as corrections of a Gaussian's own, in coordinates in which every time looks alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_event_size,
    check_finite,
    check_ndim,
    check_positive_int,
    check_real,
    check_same_dtype,
    check_type,
    values_unchecked,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.errors import TooFewDrawsError
from stochdyn.interpolants.fields.conversions import check_known
from stochdyn.interpolants.fields.networks import FieldNetwork, TimedNetwork
from stochdyn.interpolants.paths.interpolant import TARGETS, Interpolant

__all__ = ["WhitenedField"]


class _AtTime(NamedTuple):
    """What depends on time alone: y = (x - centre) scale, and the field is base + slope y + gain N, plus blur N' where there are two parts."""

    centre: Tensor
    scale: Tensor
    base: Tensor
    slope: Tensor
    gain: Tensor
    blur: Tensor
    time: Tensor
    widths: Tensor


class WhitenedField(TimedNetwork):
    r"""A field as that of Gaussian ends plus a network of whitened states.

    .. math::
        f(t,x)=f_G(t,x)+Q\,G_f(t)\,N_\theta(\tau,\tilde y),\qquad
        \tilde y=V_t^{-1/2}\big(Q^\top x-m_t\big),\qquad V_t=\alpha^2v_0+\beta^2v_1+\gamma^2

    with the moments :math:`m_0,v_0,m_1,v_1` of the two ends in the basis Q of the principal directions of their pooled
    covariance, and :math:`f_G` the exact field between independent Gaussians with these moments (diagonal in Q). The
    network starts at zero, sees states of unit variance at every time, and instead of t alone the logarithms
    :math:`\tau` of the widths :math:`\sqrt{\alpha^2\bar v_0+\gamma^2}` and :math:`\sqrt{\beta^2\bar v_1+\gamma^2}` of what is
    left of either end's blur: near time 1 a density with sharp features changes on the scale of the first.

    The gain :math:`G_f` has the size of the field: :math:`1/\gamma` for the score, 1 for the noise_prediction,
    :math:`\sqrt{\dot\alpha^2v_0+\dot\beta^2v_1}` for v. A velocity is learnt as :math:`b=v+\dot\gamma\,\eta_z` with two
    outputs of the one network, since its two parts are of different size where :math:`\dot\gamma` is large.

    Args:
        interpolant: The path.
        name: The field that is learnt: ``"velocity"``, ``"path_velocity"``, ``"score"``, ``"noise_prediction"``, ``"start_prediction"`` or
            ``"data_prediction"``.
        mean0: The mean of the first end in the basis, ``(d,)``.
        variance0: The variances of the first end along the basis, ``(d,)``.
        mean1: The mean of the second end in the basis, ``(d,)``.
        variance1: The variances of the second end along the basis, ``(d,)``.
        basis: An orthogonal matrix ``(d, d)`` with the directions in its columns; None for the coordinates themselves.
        width: The width of the hidden layers.
        depth: The number of hidden layers.
        condition_dim: The number of components of a context vector; 0 for none.
        num_classes: The number of labels, given as integers; 0 for none.
        frequencies: The number of random directions along which the network also sees sine and cosine of the whitened state.
            A plain network learns coarse features long before fine ones; in few dimensions, for laws with edges, 32
            to 64 of them save most of the training.
        finest: The largest angular frequency, in inverse standard deviations; they are spread evenly in logarithm from 1.
        clip: The distance from the ends of [0, 1] at which what grows without bound is held.
        skips: Whether hidden layers add to what came before, as in :class:`FieldNetwork`.

    Raises:
        InvalidInputError: If the path has no such field, or clip or finest are out of range.

    Example:
        >>> it = Interpolant("linear")
        >>> field = WhitenedField.from_data(it, "velocity", torch.randn(500, 2) + 3)
        >>> field(torch.rand(5, 1), torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference:
        The preconditioning of Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, section 5,
        carried over to two ends.
    """

    mean0: Tensor
    variance0: Tensor
    mean1: Tensor
    variance1: Tensor
    basis: Tensor | None
    waves: Tensor | None
    log_ranges: Tensor

    def __init__(
        self,
        interpolant: Interpolant,
        name: str,
        mean0: Tensor,
        variance0: Tensor,
        mean1: Tensor,
        variance1: Tensor,
        basis: Tensor | None = None,
        width: int = 64,
        depth: int = 3,
        *,
        condition_dim: int = 0,
        num_classes: int = 0,
        frequencies: int = 0,
        finest: float = 20.0,
        clip: float = 1e-4,
        skips: bool = False,
    ) -> None:
        super().__init__()
        check_choice(name, TARGETS, "name")
        check_known(interpolant, [name])
        check_real(clip, "clip", above=0.0, below=0.5)
        check_positive_int(frequencies, "frequencies", 0)
        check_real(finest, "finest", minimum=1.0)
        self._ready: dict[float, _AtTime] = {}
        # not registered: what a path learns isn't the field's to train
        self._path, self.name, self.clip = (interpolant,), name, clip
        mean1 = as_tensor(mean1, "mean1", 1, "(d,)")
        mean0 = as_tensor(mean0, "mean0", 1, "(d,)", like=mean1)
        variance0 = as_tensor(variance0, "variance0", like=mean1)
        variance1 = as_tensor(variance1, "variance1", like=mean1)
        dim = mean1.shape[-1]
        self.register_buffer("mean0", mean0.detach().clone())
        self.register_buffer("variance0", variance0.detach().clone())
        self.register_buffer("mean1", mean1.detach().clone())
        self.register_buffer("variance1", variance1.detach().clone())
        self.register_buffer("basis", None if basis is None else basis.detach().clone())
        self.register_buffer("waves", _waves(mean1, frequencies, finest) if frequencies else None)
        self.two_parts = name == "velocity" and interpolant.has_latent
        self.network = FieldNetwork(
            dim + 2 + 2 * frequencies,
            width,
            depth,
            condition_dim=condition_dim,
            num_classes=num_classes,
            out_dim=2 * dim if self.two_parts else dim,
            skips=skips,
        ).to(mean1)
        last = self.network.layers[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        near = torch.logspace(-4, -0.31, 200, dtype=torch.float64).clamp_min(clip)
        unit = self.variance0.mean() + self.variance1.mean()
        logs = self._log_widths(torch.cat([near, 1 - near]).to(mean1).unsqueeze(-1), unit)
        low, high = logs.amin(0), logs.amax(0)
        self.register_buffer("log_ranges", torch.stack([low, (high - low).clamp_min(1e-6)]))

    @property
    def interpolant(self) -> Interpolant:
        """The path."""
        return self._path[0]

    @classmethod
    def from_data(
        cls,
        interpolant: Interpolant,
        name: str,
        x1: Tensor,
        x0: Tensor | None = None,
        width: int = 64,
        depth: int = 3,
        *,
        rotate: bool = True,
        condition_dim: int = 0,
        num_classes: int = 0,
        frequencies: int = 0,
        finest: float = 20.0,
        clip: float = 1e-4,
        skips: bool = False,
    ) -> WhitenedField:
        """Return a field whose Gaussians have the moments of data.

        Args:
            interpolant: The path.
            name: The field that is learnt, such as ``"velocity"``.
            x1: The points of the second end, ``(n, d)``.
            x0: The points of the first end, ``(n, d)``; the standard normal if None.
            width: The width of the hidden layers.
            depth: The number of hidden layers.
            rotate: Whether to use the principal directions of the pooled covariance; the coordinates serve where d is large.
            condition_dim: The number of components of a context vector; 0 for none.
            num_classes: The number of labels, given as integers; 0 for none.
            frequencies: The number of random directions along which the network sees sines and cosines of the state.
            finest: The largest angular frequency, in inverse standard deviations.
            clip: The distance from the ends of [0, 1] at which what grows without bound is held.
            skips: Whether hidden layers add to what came before, as in :class:`FieldNetwork`.

        Raises:
            ShapeError: If the data aren't ``(n, d)`` with one d.
            TooFewDrawsError: If there are fewer than two points.
            NonFiniteError: If a point isn't finite.
        """
        check_type(interpolant, Interpolant, "interpolant")
        check_choice(name, TARGETS, "name")
        x1 = as_tensor(x1, "x1", 2, "points (n, d)")
        if x0 is not None:
            x0 = as_tensor(x0, "x0", 2, "points (n, d)", like=x1)
            check_same_dtype(x0=x0, x1=x1)
        moments = []
        for data, label in ((x0, "x0"), (x1, "x1")):
            if data is None:
                moments.append((x1.new_zeros(x1.shape[-1]), torch.eye(x1.shape[-1]).to(x1)))
                continue
            check_ndim(data, 2, label, "points (n, d)")
            check_event_size(data, x1.shape[-1], label)
            check_finite(data, label)
            if len(data) < 2:
                raise TooFewDrawsError(
                    f"{label} has too few points for moments", got=len(data), expected="at least 2"
                )
            moments.append((data.mean(0), torch.cov(data.mT).reshape(data.shape[-1], -1)))
        (mean0, covariance0), (mean1, covariance1) = moments
        basis = torch.linalg.eigh((covariance0 + covariance1).double())[1].to(x1) if rotate else None
        ends = []
        for mean, covariance in ((mean0, covariance0), (mean1, covariance1)):
            if basis is not None:
                mean, covariance = mean @ basis, basis.mT @ covariance @ basis
            variance = covariance.diagonal()
            ends.append((mean, _positive(variance, variance.mean() + mean.square().mean())))
        return cls(
            interpolant, name, *ends[0], *ends[1], basis=basis, width=width, depth=depth, condition_dim=condition_dim,
            num_classes=num_classes, frequencies=frequencies, finest=finest, clip=clip, skips=skips,
        )  # fmt: skip

    def _log_widths(self, t: Tensor, unit: Tensor) -> Tensor:
        """Return ``(..., 2)``: logarithms of the widths of the state given either end."""
        it, inner = self.interpolant, t.clamp(self.clip, 1 - self.clip)
        latent = it.gamma.square(inner) if it.has_latent else torch.zeros_like(inner)
        first, second = latent, latent + it.beta.square(inner) * self.variance1.mean()
        if it.kind != "mirror":
            first = first + it.alpha.square(inner) * self.variance0.mean()
        return 0.5 * _positive(torch.cat([first, second], -1), unit).log()

    def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return ``(..., d)`` for ``t (..., 1)`` and ``x (..., d)``.

        Raises:
            ShapeError: If ``x`` has another dimension than the data.
        """
        check_event_size(x, self.mean1.shape[-1], "x")
        time = as_time(t, x).to(x.dtype)
        time = time.reshape(1) if time.ndim == 0 else time
        at = self._ready.get(float(time.reshape(-1)[0])) if self._ready and _is_one(time) else None
        if at is None or at.scale.dtype != x.dtype:
            # who gave the times has looked at them
            with values_unchecked():
                at = self._at(time)
        state = x if self.basis is None else x @ self.basis
        y = (state - at.centre) * at.scale
        seen = [y, at.widths.expand(*x.shape[:-1], 2)]
        if self.waves is not None:
            phase = y @ self.waves
            seen += [phase.sin(), phase.cos()]
        net = self.network(at.time.expand(*x.shape[:-1], 1), torch.cat(seen, -1), condition)
        field = at.base + at.slope * y
        if self.two_parts:
            even, blurred = net.chunk(2, -1)
            field = field + at.gain * even + at.blur * blurred
        else:
            field = field + at.gain * net
        return field if self.basis is None else field @ self.basis.mT

    @contextmanager
    def at_times(self, times: Tensor) -> Iterator[None]:
        """Compute at once what depends on times ``(n,)`` alone; inside the block it serves evaluations at one of them for all points."""
        with values_unchecked():
            rows = zip(*(v.split(1) for v in self._at(times.unsqueeze(-1))), strict=True)
        self._ready = {t: _AtTime(*row) for t, row in zip(times.tolist(), rows, strict=True)}
        try:
            yield
        finally:
            self._ready = {}

    def _at(self, time: Tensor) -> _AtTime:
        it, unit = self.interpolant, self.variance0.mean() + self.variance1.mean()
        inner = time.clamp(self.clip, 1 - self.clip)
        b, db = it.beta.value(time), it.beta.derivative(inner)
        # m_t = a m0 + b m1 and V_t = a^2 v0 + b^2 v1 + gamma^2 in the basis, with their rates m_t' and V_t' / 2
        centre, variance = b * self.mean1, b.square() * self.variance1
        drift, spread = db * self.mean1, b * db * self.variance1
        a = da = torch.zeros_like(time)
        if it.kind != "mirror":
            a, da = it.alpha.value(time), it.alpha.derivative(inner)
            centre, variance = centre + a * self.mean0, variance + a.square() * self.variance0
            drift = drift + da * self.mean0
            spread = spread + (0.5 * it.alpha.square_derivative(inner)) * self.variance0
        smooth = spread
        if it.has_latent:
            variance = variance + it.gamma.square(time)
            spread = spread + 0.5 * it.gamma.square_derivative(time)
        scale = _positive(variance, unit).rsqrt()
        blur = time  # not used but for two parts
        # E[x1 | x_t] = m1 + b v1 V_t^{-1/2} y for the Gaussian, and likewise for the start
        if self.name == "data_prediction":
            base, slope, gain = (
                _at_each(self.mean1, centre),
                b * self.variance1 * scale,
                _at_each(self.variance1.sqrt(), centre),
            )
        elif self.name == "start_prediction" or (self.name == "noise_prediction" and it.kind == "one-sided"):
            base, slope, gain = (
                _at_each(self.mean0, centre),
                a * self.variance0 * scale,
                _at_each(self.variance0.sqrt(), centre),
            )
        elif self.name in ("velocity", "path_velocity"):
            # b = m_t' + V_t' / 2 V_t^{-1/2} y; the correction has the size of the rates of the two ends
            base, slope = drift, (spread if self.name == "velocity" else smooth) * scale
            gain = (da.square() * self.variance0 + db.square() * self.variance1).sqrt()
            if self.two_parts:
                blur = it.gamma.derivative(inner)
        # E[z | x_t] = gamma V_t^{-1/2} y, and the score is -1 / gamma times it
        elif self.name == "noise_prediction":
            base, slope, gain = (
                torch.zeros_like(centre),
                it.noise.value(inner) * scale,
                torch.ones_like(centre),
            )
        else:
            base, slope, gain = torch.zeros_like(centre), -scale, -1 / it.noise.value(inner)
        low, width = self.log_ranges
        widths = (self._log_widths(time, unit) - low) * (2 / width) - 1
        return _AtTime(centre, scale, base, slope, gain, blur, 2 * time - 1, widths)


def _at_each(value: Tensor, like: Tensor) -> Tensor:
    """Return a constant beside what depends on time."""
    return value.expand_as(like)


def _is_one(time: Tensor) -> bool:
    """Return whether times are one number, seen once or spread over all points."""
    return time.numel() == 1 or not any(time.stride())


def _positive(variance: Tensor, unit: Tensor) -> Tensor:
    """Return variances of which none is less than 1e-12 of ``unit``."""
    return torch.maximum(variance, 1e-12 * unit).clamp_min(torch.finfo(variance.dtype).tiny)


def _waves(like: Tensor, count: int, finest: float) -> Tensor:
    """Return ``(d, count)``: random directions, with lengths spread evenly in logarithm from 1 to ``finest``."""
    direction = torch.nn.functional.normalize(torch.randn(like.shape[-1], count).to(like), dim=0)
    return direction * torch.logspace(0, math.log10(finest), count).to(like)
