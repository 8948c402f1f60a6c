"""Measurement frames: informationally complete measurements of a site, their duals and their estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from stochdyn.errors import FrameError, InvalidInputError, ZeroProbabilityError
from stochdyn.povm.frames.operators import as_operator, as_state
from stochdyn.povm.frames.products import coefficients_of, density_of, probabilities_of, sites_of

__all__ = ["FourPauli", "Frame", "QutritSIC", "Tetrahedral"]

C128 = torch.complex128
_TOLERANCE = 1e-9


class Frame:
    r"""An informationally complete measurement (POVM) of one site, from its effects.

    .. math::
        M_a\ge0,\quad \sum_a M_a=1,\quad p(a)=\operatorname{Tr}\rho M_a,\qquad
        T_{ab}=\operatorname{Tr}M_aM_b,\quad N_a=\sum_b T^+_{ab}M_b,\quad \rho=\sum_a p(a)N_a

    Args:
        effects: ``(K, d, d)`` matrices; ``K > d**2`` (overcomplete) is allowed, the dual then being the one of
            least norm.
        name: shown in messages.

    Raises:
        FrameError: if an effect isn't Hermitian and positive, they don't sum to one, or they don't span all
            operators, so that outcomes wouldn't determine the state.

    Attributes:
        effects: ``(K, d, d)`` complex128.
        num_outcomes: ``K``.
        dim: ``d``.

    Example:
        >>> frame = Frame(Tetrahedral().effects, name="mine")
        >>> frame.probabilities("mixed")
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)

    Reference:
        Carrasquilla, Torlai, Melko and Aolita, "Reconstructing quantum states with generative models", Nature
        Machine Intelligence 1, 155 (2019).
    """

    def __init__(self, effects: Any, name: str = "Frame") -> None:
        self.name = name
        self.effects = _checked_effects(effects)
        self.num_outcomes, self.dim = self.effects.shape[:2]
        rank = int(torch.linalg.matrix_rank(self.overlap, hermitian=True, rtol=_TOLERANCE))
        if rank < self.dim**2:
            raise FrameError(
                f"{name} isn't informationally complete",
                got=f"effects that span {rank} dimensions",
                expected=f"{self.dim**2} for {self.dim} levels",
                hint="outcomes of this measurement don't determine the state; add effects, or use Tetrahedral()",
            )

    def __repr__(self) -> str:
        return f"{self.name}(num_outcomes={self.num_outcomes}, dim={self.dim})"

    def at(self, site: int) -> Frame:
        """Return the frame of a site: this one on every site."""
        return self

    @cached_property
    def overlap(self) -> Tensor:
        r"""``(K, K)`` float64, :math:`T_{ab}=\operatorname{Tr}M_aM_b`."""
        return torch.einsum("aij,bji->ab", self.effects, self.effects).real.contiguous()

    @cached_property
    def inverse_overlap(self) -> Tensor:
        """``(K, K)`` float64, the (pseudo-)inverse of the overlap."""
        return torch.linalg.pinv(self.overlap, rtol=_TOLERANCE, hermitian=True)

    @cached_property
    def dual(self) -> Tensor:
        r"""``(K, d, d)`` complex128, the dual frame :math:`N_a=\sum_bT^+_{ab}M_b`."""
        return torch.einsum("ab,bij->aij", self.inverse_overlap.to(C128), self.effects)

    @property
    def condition_number(self) -> float:
        """Largest over smallest nonzero eigenvalue of the overlap: how much statistical noise is amplified."""
        values = torch.linalg.eigvalsh(self.overlap)
        return float(values[-1] / values[-(self.dim**2)])

    def probabilities(self, state: Any) -> Tensor:
        r"""Return the probabilities of the outcomes, :math:`p(a)=\operatorname{Tr}\rho M_a`.

        Args:
            state: a name (``"up" "down" "x+" "x-" "y+" "y-" "mixed"``), a vector, a density matrix or a
                ``Qobj``; of one site, or of ``k`` sites measured with this frame each.

        Returns:
            ``(K**k,)`` float64, the first site slowest.

        Raises:
            InvalidInputError: if the state is unknown or no density matrix.
        """
        rho = as_state(state, self.dim)
        p = probabilities_of(rho, [self] * sites_of(rho, self.dim))
        return p.clamp(min=0.0)  # zeros may come out as -1e-17

    def positive_probabilities(self, state: Any) -> Tensor:
        """Return :meth:`probabilities` ``(K,)`` of a state of one site, all of them above zero.

        Raises:
            ZeroProbabilityError: if an outcome never happens, so that its logarithm is infinite.
            InvalidInputError: if the state isn't one of a single site.
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

    def coefficients(self, operator: Any) -> Tensor:
        r"""Return the estimator of an observable: its value at every outcome.

        .. math:: o(a)=\operatorname{Tr}O N_a,\qquad \langle O\rangle=\sum_a p(a)\,o(a)

        Args:
            operator: a name such as ``"Z"`` or ``"ZZ"``, a matrix, a ``Qobj``; on one site, or on ``k`` sites
                measured with this frame each.

        Returns:
            ``(K**k,)``: float64 if the operator is Hermitian, complex128 otherwise.
        """
        matrix = as_operator(operator, self.dim)
        return coefficients_of(matrix, [self] * sites_of(matrix, self.dim))

    def reconstruct(self, p: Tensor) -> Tensor:
        r"""Return :math:`\rho=\sum_ap(a)N_a` ``(d**k, d**k)`` from probabilities ``(K**k,)``."""
        sites = max(1, round(math.log(p.shape[-1], self.num_outcomes)))
        return density_of(p, [self] * sites)

    def rotated(self, unitary: Any) -> Frame:
        r"""Return the frame with effects :math:`UM_aU^\dagger`."""
        u = as_operator(unitary, self.dim, 1, "unitary")
        return Frame(u @ self.effects @ u.mH, name=f"rotated {self.name}")


class Tetrahedral(Frame):
    r"""Symmetric measurement of a qubit along the corners of a tetrahedron.

    .. math:: M_a=\tfrac14(1+v_a\cdot\sigma)

    Args:
        rotated: corners (1,1,1), (1,-1,-1), (-1,1,-1), (-1,-1,1) over √3, where all eigenstates of the Pauli
            matrices give every outcome with positive probability; otherwise corner 0 points along z, where a
            master equation with ZZ couplings has fewer entries but ``down`` never gives outcome 0.

    Example:
        >>> Tetrahedral().probabilities("up")
        tensor([0.3943, 0.1057, 0.1057, 0.3943], dtype=torch.float64)
    """

    def __init__(self, rotated: bool = True) -> None:
        if rotated:
            v = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
            v = v / math.sqrt(3)
        else:
            r, s = math.sqrt(2) / 3, math.sqrt(2 / 3)
            rows = [[0, 0, 1], [2 * r, 0, -1 / 3], [-r, s, -1 / 3], [-r, -s, -1 / 3]]
            v = torch.tensor(rows, dtype=torch.float64)
        sigma = torch.stack([as_operator(name, 2) for name in "XYZ"])
        effects = (torch.eye(2, dtype=C128) + torch.einsum("ai,ijk->ajk", v.to(C128), sigma)) / 4
        super().__init__(effects, name="Tetrahedral" if rotated else "Tetrahedral(rotated=False)")
        self.vectors = v


class FourPauli(Frame):
    """A third each of the projectors on ``up``, ``x+`` and ``y+``, and what is missing to one.

    Example:
        >>> FourPauli().coefficients("Z").round().tolist()
        [5.0, -1.0, -1.0, -1.0]
    """

    def __init__(self) -> None:
        three = [as_state(name, 2) / 3 for name in ("up", "x+", "y+")]
        rest = torch.eye(2, dtype=C128) - sum(three)
        super().__init__(torch.stack([*three, rest]), name="FourPauli")


class QutritSIC(Frame):
    r"""The symmetric measurement of a three-level site, the Weyl-Heisenberg orbit of :math:`(0,1,-1)/\sqrt2`.

    Nine outcomes with :math:`\operatorname{Tr}M_aM_b=(3\delta_{ab}+1)/36`.

    Example:
        >>> QutritSIC().overlap[0, :3]
        tensor([0.1111, 0.0278, 0.0278], dtype=torch.float64)
    """

    def __init__(self) -> None:
        fiducial = torch.tensor([0, 1, -1], dtype=C128) / math.sqrt(2)
        phase = torch.exp(2j * math.pi * torch.arange(3, dtype=torch.float64) / 3)
        vectors = [fiducial.roll(k) * phase**j for k in range(3) for j in range(3)]
        effects = torch.stack([torch.outer(v, v.conj()) / 3 for v in vectors])
        super().__init__(effects, name="QutritSIC")


def _checked_effects(effects: Any) -> Tensor:
    if isinstance(effects, Sequence):
        effects = torch.stack([torch.as_tensor(getattr(e, "full", lambda e=e: e)()) for e in effects])
    m = torch.as_tensor(effects).detach().to(C128)
    if m.ndim != 3 or m.shape[1] != m.shape[2]:
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
