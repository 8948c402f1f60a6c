"""A linear drift given by its eigenvalues: decaying and oscillating modes, stable by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_bool, check_positive
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.sde.affine_field import AffineField
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["SpectralDrift"]


class SpectralDrift(AffineField):
    r"""The drift :math:`b(x)=\Lambda x` of independent modes, in real form.

    .. math::
        \Lambda=\mathrm{diag}\Big(-r_1,\dots,-r_m,\;
        \begin{pmatrix}-s_1&\omega_1\\-\omega_1&-s_1\end{pmatrix},\dots\Big)

    A mode of its own has the eigenvalue :math:`-r`, a pair of components the eigenvalues :math:`-s\pm i\omega`. Rates stay positive and
    frequencies are learnt on a logarithmic scale, so that the law is stable at every step of training and the fit doesn't depend on
    the unit of time. With a linear reading :math:`y=Cx+\epsilon` this is the general stable linear model in coordinates of its own
    modes, as in Koopman's view of dynamics: what is nonlinear in the state is linear in enough functions of it. The law of the modes
    is Gaussian, so evidence, posterior and forecast at irregular times are exact (:meth:`law`).

    Use it for series that oscillate and relax, seen at any times, where forecasts must not blow up; take a
    :class:`~stochdyn.LinearGaussianMeasure` with a matrix of your own where growth or a known mechanism is meant.

    Args:
        decay_rates: The rates :math:`r` of the modes that decay, ``(m,)`` in 1/time; none if empty or None.
        damping: The rates :math:`s` at which oscillations decay, ``(k,)`` in 1/time.
        angular_frequencies: The angular frequencies :math:`\omega` of the oscillations, ``(k,)`` in 1/time, positive.
        learn: Whether rates and frequencies are parameters.

    Raises:
        InvalidInputError: If there is no mode, or a rate or frequency isn't positive.
        ShapeError: If damping and frequencies differ in length.

    Example:
        >>> drift = SpectralDrift(decay_rates=[0.5], damping=[0.1], angular_frequencies=[2.0])
        >>> drift.eigenvalues()
        tensor([-0.5000+0.j, -0.1000+2.j, -0.1000-2.j])
        >>> times, y = torch.tensor([0.0, 0.4, 1.7]), torch.tensor([[0.1], [0.9], [-0.4]])
        >>> drift.law().log_evidence(times, y, obs_scale=0.1, emission=torch.ones(1, 3)).shape
        torch.Size([])
    """

    log_decay_rates: Tensor
    log_damping: Tensor
    log_angular_frequencies: Tensor

    def __init__(
        self,
        decay_rates: object = None,
        damping: object = None,
        angular_frequencies: object = None,
        learn: bool = False,
    ) -> None:
        super().__init__()
        check_bool(learn, "learn")
        given: dict[str, Tensor] = {}
        like = next((x for x in (decay_rates, damping, angular_frequencies) if isinstance(x, Tensor)), None)
        for name, value in (
            ("decay_rates", decay_rates),
            ("damping", damping),
            ("angular_frequencies", angular_frequencies),
        ):
            empty = torch.zeros(0) if like is None else like.new_zeros(0)
            given[name] = empty if value is None else as_tensor(value, name, 1, "(k,)", like=like)
            if given[name].numel():
                check_positive(given[name], name)
        counts = [len(given[name]) for name in ("damping", "angular_frequencies")]
        if counts[0] != counts[1]:
            raise ShapeError(
                "damping and angular_frequencies must have one entry per oscillation each",
                got=f"{counts[0]} and {counts[1]}",
            )
        if not (given["decay_rates"].numel() or given["damping"].numel()):
            raise InvalidInputError("a drift needs at least one mode", got="no rates and no frequencies")
        dtype = torch.promote_types(
            torch.promote_types(given["decay_rates"].dtype, given["damping"].dtype),
            given["angular_frequencies"].dtype,
        )
        for name, value in given.items():
            log = value.detach().to(dtype).log()
            if learn:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    @property
    def dim(self) -> int:
        """The number of components of the state."""
        return self.log_decay_rates.numel() + 2 * self.log_damping.numel()

    def matrix(self) -> Tensor:
        r"""Return :math:`\Lambda` in 1/time, ``(d, d)``."""
        s, w = self.log_damping.exp(), self.log_angular_frequencies.exp()
        pair = torch.stack([torch.stack([-s, w], -1), torch.stack([-w, -s], -1)], -2)
        return torch.block_diag(*(-self.log_decay_rates.exp()).reshape(-1, 1, 1), *pair)

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues, complex, ``(d,)``: decays first, then the pairs of the oscillations."""
        s, w = self.log_damping.exp(), self.log_angular_frequencies.exp()
        pairs = torch.stack([torch.complex(-s, w), torch.complex(-s, -w)], -1).flatten()
        r = self.log_decay_rates.exp()
        return torch.cat([torch.complex(-r, torch.zeros_like(r)), pairs])

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return the matrix of :meth:`matrix`, and no offset."""
        matrix = self.matrix()
        return matrix, matrix.new_zeros(self.dim)

    def law(self, initial_time: float = 0.0) -> LinearGaussianMeasure:
        r"""Return the stationary law of the modes with unit variance, in closed form and differentiable in rates and frequencies.

        The noise of a mode with rate r is :math:`\sqrt{2r}`, which makes its variance one; sizes are those of the reading.

        Args:
            initial_time: The time at which the law starts.
        """
        strength = (2 * torch.cat([self.log_decay_rates, self.log_damping.repeat_interleave(2)]).exp()).sqrt()
        zero = torch.zeros_like(strength)
        eye = torch.eye(self.dim, dtype=zero.dtype, device=zero.device)
        return LinearGaussianMeasure(self.matrix(), zero, strength, zero, eye, initial_time=initial_time)
