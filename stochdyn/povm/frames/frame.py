"""Measurement frames: informationally complete measurements of a site, their duals and their estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_choice, check_positive_int, check_real
from stochdyn.errors import FrameError, InvalidInputError, ShapeError, ZeroProbabilityError
from stochdyn.povm.frames.operators import as_array, as_operator, as_state
from stochdyn.povm.frames.products import coefficients_of, density_of, probabilities_of, sites_of

__all__ = [
    "Basis",
    "FourPauli",
    "Frame",
    "Measurement",
    "Pauli6",
    "QutritSIC",
    "Tetrahedral",
    "Unmeasured",
]

C128 = torch.complex128
_TOLERANCE = 1e-9


class Measurement:
    r"""A measurement (POVM) of one site, from its effects; it need not determine the state.

    .. math:: M_a\ge0,\quad \sum_a M_a=1,\quad p(a)=\operatorname{Tr}\rho M_a

    When would I use this? For records of an incomplete measurement, of one basis say, whose likelihood needs
    probabilities and no more. A :class:`Frame` is a complete one, from whose outcomes states can be reconstructed.

    Args:
        effects: The effects as matrices ``(K, d, d)``; an effect of zero is an outcome that never happens.
        name: The name that messages show.

    Raises:
        FrameError: If an effect isn't Hermitian and positive, or they don't sum to one.

    Attributes:
        effects: The effects ``(K, d, d)``, complex128.
        num_outcomes: The number ``K`` of outcomes.
        dim: The number ``d`` of levels.

    Example:
        >>> z = Measurement([[[1, 0], [0, 0]], [[0, 0], [0, 1]]], name="z")
        >>> z.probabilities("x+")
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, effects: Any, name: str = "Measurement") -> None:
        self.name = str(name)
        self.effects = _checked_effects(effects)
        self.num_outcomes, self.dim = self.effects.shape[:2]

    def __repr__(self) -> str:
        return f"{self.name}(num_outcomes={self.num_outcomes}, dim={self.dim})"

    def at(self, site: int) -> Measurement:
        """Return the measurement of a site: this one on every site."""
        return self

    @cached_property
    def overlap(self) -> Tensor:
        r"""The overlaps ``(K, K)`` float64, :math:`T_{ab}=\operatorname{Tr}M_aM_b`."""
        return torch.einsum("aij,bji->ab", self.effects, self.effects).real.contiguous()

    def probabilities(self, state: Any) -> Tensor:
        r"""Return the probabilities of the outcomes, :math:`p(a)=\operatorname{Tr}\rho M_a`.

        Args:
            state: The state: a name (``"up" "down" "x+" "x-" "y+" "y-" "mixed"``), a vector, a density matrix or a
                ``Qobj``; of one site, or of ``k`` sites measured with this frame each.

        Returns:
            ``(K**k,)`` float64, the first site slowest.

        Raises:
            InvalidInputError: If the state is unknown or no density matrix.
        """
        rho = as_state(state, self.dim)
        p = probabilities_of(rho, [self] * sites_of(rho, self.dim))
        return p.clamp(min=0.0)  # zeros may come out as -1e-17

    def positive_probabilities(self, state: Any) -> Tensor:
        """Return :meth:`probabilities` ``(K,)`` of a state of one site, all of them above zero.

        Raises:
            ZeroProbabilityError: If an outcome never happens, so that its logarithm is infinite.
            InvalidInputError: If the state isn't one of a single site.
        """
        p = self.probabilities(state)
        if p.shape[0] != self.num_outcomes:
            raise InvalidInputError("this must be the state of a single site", got=f"{p.shape[0]} outcomes")
        low, place = p.min(0)
        if float(low) < 1e-12:
            raise ZeroProbabilityError(
                f"outcome {int(place)} of {self.name} has probability zero in this state",
                got=state if isinstance(state, str) else "a pure state orthogonal to the effect",
                hint=_advice(state, self.dim),
            )
        return p

    def with_readout_errors(self, confusion: Any) -> Measurement:
        r"""Return the measurement whose outcomes are misread, :math:`M'_a=\sum_bC_{ab}M_b`.

        Args:
            confusion: The probabilities ``(K, K)`` of reading ``a`` where the outcome was ``b``; columns sum to one.

        Raises:
            FrameError: If they are no probabilities.

        Example:
            >>> Measurement([[[1, 0], [0, 0]], [[0, 0], [0, 1]]]).with_readout_errors([[0.9, 0.2], [0.1, 0.8]]).effects[0].real
            tensor([[0.9000, 0.0000],
                    [0.0000, 0.2000]], dtype=torch.float64)
        """
        c = as_tensor(confusion, "confusion", 2, "(K, K)", like=torch.empty(0, dtype=torch.float64)).double()
        k = self.num_outcomes
        if c.shape != (k, k) or float(c.min()) < 0 or float((c.sum(0) - 1).abs().max()) > 1e-8:
            raise FrameError(
                "confusion must hold probabilities whose columns sum to one",
                got=f"shape {tuple(c.shape)}, column sums {[round(x, 4) for x in c.sum(0).tolist()]}",
                expected=(k, k),
            )
        effects = torch.einsum("ab,bij->aij", (c / c.sum(0)).to(C128), self.effects)
        return type_of(self)(effects, name=f"misread {self.name}")


def type_of(measurement: Measurement) -> type[Measurement]:
    """Return the class that makes a measurement of the same kind from effects."""
    return Frame if isinstance(measurement, Frame) else Measurement


class Frame(Measurement):
    r"""An informationally complete measurement (POVM) of one site, from its effects.

    .. math::
        T_{ab}=\operatorname{Tr}M_aM_b,\quad N_a=\sum_b T^+_{ab}M_b,\quad \rho=\sum_a p(a)N_a

    Args:
        effects: The effects as matrices ``(K, d, d)``; ``K > d**2`` (overcomplete) is allowed, the dual then being the
            one of least norm.
        name: The name that messages show.

    Raises:
        FrameError: If an effect isn't Hermitian and positive, they don't sum to one, or they don't span all operators,
            so that outcomes wouldn't determine the state.

    Attributes:
        effects: The effects ``(K, d, d)``, complex128.
        num_outcomes: The number ``K`` of outcomes.
        dim: The number ``d`` of levels.

    Example:
        >>> frame = Frame(Tetrahedral().effects, name="mine")
        >>> frame.probabilities("mixed")
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)

    Reference:
        Carrasquilla, Torlai, Melko and Aolita, "Reconstructing quantum states with generative models", Nature
        Machine Intelligence 1, 155 (2019).
    """

    def __init__(self, effects: Any, name: str = "Frame") -> None:
        super().__init__(effects, name)
        rank = int(torch.linalg.matrix_rank(self.overlap, hermitian=True, rtol=_TOLERANCE))
        if rank < self.dim**2:
            raise FrameError(
                f"{name} isn't informationally complete",
                got=f"effects that span {rank} dimensions",
                expected=f"{self.dim**2} for {self.dim} levels",
                hint="outcomes of this measurement don't determine the state; add effects, use Tetrahedral(), or for "
                "the likelihood of records alone a Measurement",
            )

    def at(self, site: int) -> Frame:
        """Return the frame of a site: this one on every site."""
        return self

    @cached_property
    def inverse_overlap(self) -> Tensor:
        """The (pseudo-)inverse ``(K, K)`` of the overlap, float64."""
        return torch.linalg.pinv(self.overlap, rtol=_TOLERANCE, hermitian=True)

    @cached_property
    def dual(self) -> Tensor:
        r"""The dual frame ``(K, d, d)`` complex128, :math:`N_a=\sum_bT^+_{ab}M_b`."""
        return torch.einsum("ab,bij->aij", self.inverse_overlap.to(C128), self.effects)

    @property
    def condition_number(self) -> float:
        """Largest over smallest nonzero eigenvalue of the overlap: how much statistical noise is amplified."""
        values = torch.linalg.eigvalsh(self.overlap)
        return float(values[-1] / values[-(self.dim**2)])

    def coefficients(self, operator: Any) -> Tensor:
        r"""Return the estimator of an observable: its value at every outcome.

        .. math:: o(a)=\operatorname{Tr}O N_a,\qquad \langle O\rangle=\sum_a p(a)\,o(a)

        Args:
            operator: The operator: a name such as ``"Z"`` or ``"ZZ"``, a matrix, a ``Qobj``; on one site, or on ``k``
                sites measured with this frame each.

        Returns:
            ``(K**k,)``: float64 if the operator is Hermitian, complex128 otherwise.
        """
        matrix = as_operator(operator, self.dim)
        return coefficients_of(matrix, [self] * sites_of(matrix, self.dim))

    def reconstruct(self, p: Tensor) -> Tensor:
        r"""Return :math:`\rho=\sum_ap(a)N_a` ``(d**k, d**k)`` from probabilities ``(K**k,)``."""
        p = as_array(p, "p")
        sites = max(1, round(math.log(max(p.shape[-1], 1), self.num_outcomes))) if p.ndim == 1 else 0
        if sites == 0 or self.num_outcomes**sites != p.shape[-1]:
            raise ShapeError(
                "p must be probabilities (K**k,)",
                got=tuple(p.shape),
                expected=f"a power of {self.num_outcomes}",
            )
        return density_of(p, [self] * sites)

    def rotated(self, unitary: Any) -> Frame:
        r"""Return the frame with effects :math:`UM_aU^\dagger`."""
        u = as_operator(unitary, self.dim, 1, "unitary")
        return Frame(u @ self.effects @ u.mH, name=f"rotated {self.name}")


class Tetrahedral(Frame):
    r"""Symmetric measurement of a qubit along the corners of a tetrahedron.

    .. math:: M_a=\tfrac14(1+v_a\cdot\sigma)

    When would I use this? To begin with: of all measurements with four outcomes it amplifies statistical noise least, and
    turned as by default every eigenstate of X, Y and Z is a possible start.

    Args:
        rotated: Whether the corners are (1,1,1), (1,-1,-1), (-1,1,-1), (-1,-1,1) over √3, where all eigenstates of the
            Pauli matrices give every outcome with positive probability; otherwise corner 0 points along z, where a
            master equation with ZZ couplings has fewer entries but ``down`` never gives outcome 0.

    Example:
        >>> Tetrahedral().probabilities("up")
        tensor([0.3943, 0.1057, 0.1057, 0.3943], dtype=torch.float64)
    """

    def __init__(self, rotated: bool = True) -> None:
        if rotated:
            # four unit vectors whose sum is zero: the corners of a tetrahedron
            v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
            v = v / math.sqrt(3)
        else:
            r, s = math.sqrt(2) / 3, math.sqrt(2 / 3)
            rows = [[0, 0, 1], [2 * r, 0, -1 / 3], [-r, s, -1 / 3], [-r, -s, -1 / 3]]
            v = torch.tensor(rows, dtype=torch.float64)
        sigma = torch.stack([as_operator(name, 2) for name in "XYZ"])
        # M_a = (1 + v_a . sigma)/4
        effects = (torch.eye(2, dtype=C128) + torch.einsum("ai,ijk->ajk", v.to(C128), sigma)) / 4
        super().__init__(effects, name="Tetrahedral" if rotated else "Tetrahedral(rotated=False)")
        self.vectors = v


class FourPauli(Frame):
    """A third each of the projectors on ``up``, ``x+`` and ``y+``, and what is missing to one.

    When would I use this? To compare with published results in this frame; its estimates are noisier than those of
    :class:`Tetrahedral`, and ``down``, ``x-`` and ``y-`` are no possible starts of a network.

    Example:
        >>> FourPauli().coefficients("Z").round().tolist()
        [5.0, -1.0, -1.0, -1.0]
    """

    def __init__(self) -> None:
        three = [as_state(name, 2) / 3 for name in ("up", "x+", "y+")]
        rest = torch.eye(2, dtype=C128) - sum(three)
        super().__init__(torch.stack([*three, rest]), name="FourPauli")


class Pauli6(Frame):
    r"""A third each of the measurements of X, Y and Z: each site is measured in one of three bases, drawn at random.

    Outcome ``2 * basis + bit``, for the bases X, Y, Z in this order and bit 0 for the eigenvalue +1. The likelihood of
    records whose bases were chosen otherwise, even always the same, differs by a constant factor only, so they are
    records of this frame too (:meth:`~stochdyn.povm.MeasurementRecords.from_bits`). When would I use this? For records of
    hardware that measures single qubits in bases. A network would have to give six outcomes, where four would do.

    Args:
        readout_error: The probability of reading the wrong bit, or a pair: of reading 1 for 0, and 0 for 1.

    Raises:
        FrameError: If an error isn't a probability below one half.

    Example:
        >>> Pauli6().probabilities("x+")
        tensor([0.3333, 0.0000, 0.1667, 0.1667, 0.1667, 0.1667], dtype=torch.float64)
        >>> Pauli6.outcome("Z", 1)
        5
    """

    def __init__(self, readout_error: float | Sequence[float] = 0.0) -> None:
        pair: list[Any] = (
            list(readout_error) if isinstance(readout_error, list | tuple) else [readout_error] * 2
        )
        if len(pair) != 2:
            raise FrameError("readout_error must be one number or a pair", got=repr(readout_error)[:60])
        for value in pair:
            check_real(value, "readout_error", minimum=0.0, below=0.5)
        up, down = (float(x) for x in pair)
        effects = []
        for plus, minus in (("x+", "x-"), ("y+", "y-"), ("up", "down")):
            # M_bit = (1 - e) P_bit + e P_other, a third for each basis
            zero, one = as_state(plus, 2) / 3, as_state(minus, 2) / 3
            effects += [(1 - up) * zero + down * one, up * zero + (1 - down) * one]
        super().__init__(torch.stack(effects), name="Pauli6")
        self.readout_error = (up, down)

    @staticmethod
    def outcome(basis: str, bit: int) -> int:
        """Return the number of the outcome ``bit`` of the measurement of ``"X"``, ``"Y"`` or ``"Z"``.

        Raises:
            InvalidInputError: If the basis or the bit is unknown.
        """
        check_choice(basis, ("X", "Y", "Z"), "basis")
        if bit not in (0, 1):
            raise InvalidInputError("bit must be 0 or 1", got=repr(bit)[:60])
        return 2 * "XYZ".index(basis) + int(bit)


class Basis(Measurement):
    """The measurement of a qubit in the basis of X, Y or Z, which doesn't determine its state.

    When would I use this? For records of one basis alone, through their likelihood.

    Args:
        name: The basis, ``"X"``, ``"Y"`` or ``"Z"``; outcome 0 is the eigenvalue +1.

    Example:
        >>> Basis("Z").probabilities("up")
        tensor([1., 0.], dtype=torch.float64)
    """

    def __init__(self, name: str = "Z") -> None:
        check_choice(name, ("X", "Y", "Z"), "name")
        pair = {"X": ("x+", "x-"), "Y": ("y+", "y-"), "Z": ("up", "down")}[name]
        super().__init__(torch.stack([as_state(state, 2) for state in pair]), name=f"Basis({name!r})")


class Unmeasured(Measurement):
    """No measurement: one outcome that always happens.

    When would I use this? Within :class:`SiteFrames`, for sites that nobody looks at.

    Args:
        dim: The number of levels of the site.

    Example:
        >>> Unmeasured().probabilities("up")
        tensor([1.], dtype=torch.float64)
    """

    def __init__(self, dim: int = 2) -> None:
        check_positive_int(dim, "dim", 2)
        super().__init__(torch.eye(dim, dtype=C128)[None], name="Unmeasured")


class QutritSIC(Frame):
    r"""The symmetric measurement of a three-level site, the Weyl-Heisenberg orbit of :math:`(0,1,-1)/\sqrt2`.

    Nine outcomes with :math:`\operatorname{Tr}M_aM_b=(3\delta_{ab}+1)/36`. When would I use this? For qutrits, to begin
    with: it is what :class:`Tetrahedral` is for qubits.

    Example:
        >>> QutritSIC().overlap[0, :3]
        tensor([0.1111, 0.0278, 0.0278], dtype=torch.float64)
    """

    def __init__(self) -> None:
        fiducial = torch.tensor([0, 1, -1], dtype=C128) / math.sqrt(2)
        phase = torch.exp(2j * math.pi * torch.arange(3, dtype=torch.float64) / 3)
        # the orbit X^k Z^j of the fiducial vector; effects are the projectors over d = 3
        vectors = [fiducial.roll(k) * phase**j for k in range(3) for j in range(3)]
        effects = torch.stack([torch.outer(v, v.conj()) / 3 for v in vectors])
        super().__init__(effects, name="QutritSIC")


def _checked_effects(effects: Any) -> Tensor:
    try:
        if isinstance(effects, list | tuple):
            effects = np.stack([np.asarray(getattr(e, "full", lambda e=e: e)()) for e in effects])
        m = effects.detach() if isinstance(effects, Tensor) else torch.as_tensor(np.array(effects))
        m = m.to(C128)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FrameError("effects must be matrices (K, d, d)", got=repr(effects)[:60]) from error
    if m.ndim != 3 or m.shape[1] != m.shape[2] or 0 in m.shape:
        raise FrameError("effects must be (K, d, d)", got=f"shape {tuple(m.shape)}")
    if not bool(torch.isfinite(torch.view_as_real(m.resolve_conj())).all()):
        raise FrameError("effects must be finite")
    if float((m - m.mH).abs().max()) > _TOLERANCE:
        raise FrameError("effects must be Hermitian", got=f"{float((m - m.mH).abs().max()):.3g} off")
    lowest = torch.linalg.eigvalsh(m)[:, 0]
    if float(lowest.min()) < -_TOLERANCE:
        raise FrameError(
            "effects must be positive",
            got=f"eigenvalue {float(lowest.min()):.3g} of effect {int(lowest.argmin())}",
        )
    excess = (m.sum(0) - torch.eye(m.shape[1], dtype=C128)).abs().max()
    if float(excess) > _TOLERANCE:
        raise FrameError("effects must sum to the identity", got=f"{float(excess):.3g} off")
    return m


def _advice(state: Any, dim: int) -> str:
    candidates = [Tetrahedral(), Tetrahedral(rotated=False), FourPauli()] if dim == 2 else [QutritSIC()]
    fitting = [f.name for f in candidates if f.dim == dim and float(f.probabilities(state).min()) > 1e-9]
    if fitting:
        name = fitting[0] if fitting[0].endswith(")") else f"{fitting[0]}()"
        return f"use {name}, all of whose outcomes are possible in this state"
    return "turn the frame (frame.rotated(unitary)) until all outcomes are possible in this state"
