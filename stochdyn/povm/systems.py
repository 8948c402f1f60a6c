"""Lindbladians of the literature's test systems, with their exact observables where these are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stochdyn.errors import InvalidInputError
from stochdyn.povm.lindblad.graphs import ring, square_lattice
from stochdyn.povm.lindblad.lindbladian import Lindbladian

if TYPE_CHECKING:
    from stochdyn.datasets.quantum import OpenSystem

__all__ = ["build", "dephasing_ising", "ising", "reference", "xyz"]

Bonds = Sequence[tuple[int, int]]


def ising(
    num_sites: int,
    coupling: float = 2.0,
    field: float = 1.0,
    decay: float = 1.0,
    bonds: Bonds | None = None,
) -> Lindbladian:
    r"""Return the dissipative transverse-field Ising model.

    .. math:: H = \tfrac V4\sum_{\langle ij\rangle}Z_iZ_j+\tfrac g2\sum_iX_i,\qquad c_i=\sigma^-_i

    Args:
        num_sites: The number ``N`` of sites.
        coupling: The coupling ``V``.
        field: The transverse field ``g``.
        decay: The rate of the jumps.
        bonds: The bonds of the lattice; a ring if None.

    Example:
        >>> ising(4).bonds
        [(0, 1), (1, 2), (2, 3), (0, 3)]

    Reference:
        Vicentini, Biella, Regnault and Ciuti, Phys. Rev. Lett. 122, 250503 (2019).
    """
    bonds = list(bonds) if bonds is not None else ring(num_sites)
    return Lindbladian(
        num_sites, [(coupling / 4, "ZZ", bonds), (field / 2, "X", "all")], [(decay, "sigma-", "all")]
    )


def xyz(
    num_sites: int,
    jx: float,
    jy: float,
    jz: float,
    field: float = 0.0,
    decay: float = 1.0,
    bonds: Bonds | None = None,
) -> Lindbladian:
    r"""Return the dissipative Heisenberg (XYZ) model.

    .. math:: H = \sum_{\langle ij\rangle}(J_xX_iX_j+J_yY_iY_j+J_zZ_iZ_j)+h\sum_iZ_i,\qquad c_i=\sigma^-_i

    Args:
        num_sites: The number ``N`` of sites.
        jx: The coupling :math:`J_x` of X.
        jy: The coupling :math:`J_y` of Y.
        jz: The coupling :math:`J_z` of Z.
        field: The field ``h``.
        decay: The rate of the jumps.
        bonds: The bonds of the lattice; a ring if None.
    """
    bonds = list(bonds) if bonds is not None else ring(num_sites)
    terms = [(jx, "XX", bonds), (jy, "YY", bonds), (jz, "ZZ", bonds), (field, "Z", "all")]
    return Lindbladian(num_sites, terms, [(decay, "sigma-", "all")])


def dephasing_ising(
    num_sites: int,
    coupling: float = 1.0,
    field: float = 0.0,
    decay: float = 0.0,
    dephasing: float = 0.0,
    bonds: Bonds | None = None,
) -> Lindbladian:
    r"""Return Ising couplings with a field, decay and dephasing.

    .. math:: H = J\sum_{\langle ij\rangle}Z_iZ_j+h\sum_iX_i,\qquad \text{jumps }\sigma^-_i,\ Z_i

    Without a field the couplings commute with everything that acts on other sites, so that observables of a ring
    don't depend on its size: an exact answer for any number of sites.

    Args:
        num_sites: The number ``N`` of sites.
        coupling: The coupling ``J``.
        field: The field ``h``.
        decay: The rate of ``sigma-``.
        dephasing: The rate of ``Z``.
        bonds: The bonds of the lattice; a ring if None.
    """
    bonds = list(bonds) if bonds is not None else ring(num_sites)
    terms = [(coupling, "ZZ", bonds), (field, "X", "all")]
    return Lindbladian(num_sites, terms, [(decay, "sigma-", "all"), (dephasing, "Z", "all")])


def build(system: str, num_sites: int, **parameters: Any) -> Lindbladian:
    """Return the Lindbladian of a system of :func:`~stochdyn.datasets.quantum.open_systems`.

    Raises:
        InvalidInputError: If the system is unknown.

    Example:
        >>> build("xyz_torus", 9, jx=0.9, jy=1.6, jz=1.0).num_sites
        9
    """
    if system == "ising_ring":
        return ising(num_sites, **parameters)
    if system == "xyz_ring":
        return xyz(num_sites, **parameters)
    if system == "xyz_torus":
        side = round(num_sites**0.5)
        if side * side != num_sites:
            raise InvalidInputError("the torus is a square", got=f"{num_sites} sites")
        return xyz(num_sites, **parameters, bonds=square_lattice(side, side))
    if system in ("dephasing_ring", "commuting_ring"):
        return dephasing_ising(num_sites, **parameters)
    if system == "free_sites":
        return ising(num_sites, coupling=0.0, **parameters)
    known = "ising_ring | xyz_ring | xyz_torus | dephasing_ring | commuting_ring | free_sites"
    raise InvalidInputError("system is unknown", got=repr(system), expected=known)


def reference(
    system: str, num_sites: int, *, steady: bool = False, **which: Any
) -> tuple[Lindbladian, OpenSystem]:
    """Return a system together with its exact observables.

    Args:
        system: The name of the system, as in :class:`~stochdyn.datasets.quantum.OpenSystem`.
        num_sites: The number ``N`` of sites.
        steady: Whether to return the steady state rather than the evolution.
        which: The initial state or parameters, where several are on file; the first that fits is returned.

    Raises:
        InvalidInputError: If nothing on file fits.

    Example:
        >>> model, exact = reference("commuting_ring", 64, dephasing=0.0)
        >>> exact.initial, float(exact.expect["ZZ"][-1].round(decimals=6))
        ('x+', 0.902905)
    """
    from stochdyn.datasets.quantum import open_systems

    kind = "steady" if steady else "dynamics"
    found = open_systems(kind, system=system, num_sites=num_sites, **which)
    if not found:
        options = sorted({str(r.num_sites or "any") for r in open_systems(kind, system=system)})
        raise InvalidInputError(
            "no exact numbers are on file",
            got=f"{system} with {num_sites} sites, {which}",
            expected=f"sizes {options}",
        )
    return build(system, num_sites, **found[0].parameters), found[0]
