"""Results written into an AnnData object, in the order of its own cells, as other packages of the field read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_real, check_type
from stochdyn.bridges.laws.growing import GrowingBridge
from stochdyn.bridges.laws.lineages import row_stochastic
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.refinement import Refinement
from stochdyn.errors import InvalidInputError, MissingDependencyError

__all__ = ["to_anndata"]


def to_anndata(
    result: Refinement | SchrodingerBridge | GrowingBridge,
    adata: Any = None,
    *,
    key: str = "stochdyn",
    labels: Sequence[Any] | None = None,
    share: float = 0.999,
) -> Any:
    """Write velocities, growth, fates, transitions and parameters into an AnnData object, and return it.

    =========================  ==============================================================================================
    ``obsm[key_velocity]``     velocity of every cell at its time, in units of the representation per time, ``(N, d)``
    ``obs[key_growth]``        rate of births less deaths at every cell, per time
    ``obs[key_fate_CLASS]``    probability of ending in a class of the last snapshot, if ``labels`` are given
    ``obsp[key_transitions]``  sparse row-stochastic matrix ``(N, N)``: from each cell to those of the next time; cells of the last
                               time stay where they are
    ``uns[key]``               times, diffusion, parameters by name and the objective
    =========================  ==============================================================================================

    Cells are found by their names (:attr:`Snapshots.names`, which :func:`from_anndata` keeps), in whatever order the object has them; cells
    that took no part get NaN, and stay where they are.

    Args:
        result: The result to write: what :func:`refine` returned, or a solved bridge with couplings.
        adata: The object that is written into; a new one with the snapshots' particles if None.
        key: The first part of the names of all entries.
        labels: The class of each cell of the last snapshot, by which fates are told apart; None for no fates.
        share: The share of each row of a transition matrix that is kept; the smallest entries are left out.

    Raises:
        InvalidInputError: If a cell isn't in the object, or the snapshots have no names.
        UnavailableError: If the bridge has no couplings.
        MissingDependencyError: If a new object is wanted and AnnData isn't installed.

    Example:
        >>> from stochdyn.bridges import Snapshots
        >>> snaps = Snapshots([0.0, 1.0], [torch.zeros(3, 2), torch.ones(4, 2)])
        >>> adata = to_anndata(SchrodingerBridge(snaps, diffusion=0.5).solve())  # doctest: +SKIP
        >>> adata.obsp["stochdyn_transitions"].shape  # doctest: +SKIP
        (7, 7)
    """
    check_real(share, "share", above=0.0, maximum=1.0)
    check_type(key, str, "key")
    if isinstance(result, Refinement):
        bridge = result.bridge
        law: SchrodingerBridge | GrowingBridge = bridge
    else:
        check_type(result, (SchrodingerBridge, GrowingBridge), "result")
        law = result
        bridge = result.bridge if isinstance(result, GrowingBridge) else result
    snaps = bridge.snapshots
    if adata is None:
        adata = _fresh(bridge)
    rows = _rows(adata, snaps.names, snaps.sizes)
    total = adata.shape[0] if hasattr(adata, "shape") else len(next(iter(adata.obsm.values())))
    velocity = np.full((total, snaps.dim), np.nan)
    growth = np.full(total, np.nan)
    for snap, own in zip(snaps, rows, strict=True):
        velocity[own] = _numpy(law.velocity(snap.time, snap.sample))
        growth[own] = _numpy(law.growth_rate(snap.time, snap.sample))
    adata.obsm[f"{key}_velocity"] = velocity
    adata.obs[f"{key}_growth"] = growth
    if labels is not None:
        for name, value in _fates(bridge, labels, rows, total).items():
            adata.obs[f"{key}_fate_{name}"] = value
    adata.obsp[f"{key}_transitions"] = _transitions(bridge, rows, total, share)
    about: dict[str, Any] = {
        "times": _numpy(snaps.times), "diffusion": _numpy(bridge.spread), "objective": float(bridge.objective),
    }  # fmt: skip
    if isinstance(result, Refinement):
        about["parameters"] = {name: _numpy(value) for name, value in result.parameters.items()}
        about["stopped"] = result.history.stopped
    adata.uns[key] = about
    return adata


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()


def _fresh(bridge: SchrodingerBridge) -> Any:
    try:
        import anndata
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError(
            "AnnData is not installed", hint="pip install stochdyn[cells]"
        ) from error
    snaps = bridge.snapshots
    names = np.arange(sum(snaps.sizes)) if snaps.names is None else np.concatenate(snaps.names)
    clock = np.repeat(_numpy(snaps.times), snaps.sizes)
    obs = pd.DataFrame({"time": clock}, index=names.astype(str))
    return anndata.AnnData(_numpy(torch.cat(snaps.samples)), obs=obs)


def _rows(adata: Any, names: tuple[np.ndarray, ...] | None, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """The place of every particle in the object, one array per snapshot."""
    if names is None:
        if adata.shape[0] != sum(sizes):
            raise InvalidInputError(
                "the snapshots have no names, so their cells can't be found",
                got=f"{adata.shape[0]} cells for {sum(sizes)} particles",
                hint="make the snapshots by from_anndata, or give names=",
            )
        return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    known = getattr(adata, "obs_names", None)
    if known is None:
        return [np.asarray(own, dtype=int) for own in names]
    place = {str(name): i for i, name in enumerate(known)}
    missing = [str(name) for own in names for name in own if str(name) not in place]
    if missing:
        raise InvalidInputError(
            "adata lacks cells of the snapshots", got=f"{missing[:3]} and {len(missing)} in all"
        )
    return [np.array([place[str(name)] for name in own], dtype=int) for own in names]


def _fates(
    bridge: SchrodingerBridge, labels: Sequence[Any], rows: list[np.ndarray], total: int
) -> dict[str, np.ndarray]:
    last = len(rows) - 1
    columns: dict[str, np.ndarray] = {}
    for i in range(last):
        classes, chances = bridge.fates(labels, i, last)
        for k, name in enumerate(classes):
            columns.setdefault(str(name), np.full(total, np.nan))[rows[i]] = _numpy(chances[:, k])
    own = np.asarray(labels)
    for name, column in columns.items():
        column[rows[last]] = (own.astype(str) == name).astype(float)
    return columns


def _transitions(bridge: SchrodingerBridge, rows: list[np.ndarray], total: int, share: float) -> Any:
    """The block matrix from each time to the next, without its smallest entries, rows summing to one."""
    from scipy import sparse

    first, second, values = [], [], []
    for i, plan in enumerate(bridge.plans):
        matrix = row_stochastic(plan)
        ordered, place = matrix.sort(1, descending=True)
        kept = ordered.cumsum(1) - ordered < share
        weight = torch.where(kept, ordered, 0.0)
        weight = weight / weight.sum(1, keepdim=True)
        where = kept.nonzero()
        first.append(rows[i][where[:, 0].cpu().numpy()])
        second.append(rows[i + 1][place[kept].cpu().numpy()])
        values.append(_numpy(weight[kept]))
    moving = np.zeros(total, dtype=bool)
    for own in rows[:-1]:
        moving[own] = True
    still = np.flatnonzero(~moving)
    entries = (
        np.concatenate([*values, np.ones(len(still))]),
        (np.concatenate([*first, still]), np.concatenate([*second, still])),
    )
    return sparse.csr_matrix(entries, shape=(total, total))
