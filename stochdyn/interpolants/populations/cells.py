"""Populations of cells from an AnnData object: samples without and with treatments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.interpolants.populations.data import Populations

__all__ = ["CellPopulations", "populations_from_anndata"]


class CellPopulations(NamedTuple):
    """Populations of cells, and which they are.

    Attributes:
        data: The populations: untreated cells of a sample as starts, treated ones of the same sample as targets, and the samples as subjects.
        samples: The sample of each population.
        treatments: The treatment of each population.
        codes: What stands for each treatment in ``data.treatments``: a vector with one in its place.
    """

    data: Populations
    samples: list[str]
    treatments: list[str]
    codes: Mapping[str, Tensor]


def populations_from_anndata(
    adata: Any,
    untreated: Any,
    sample_key: str = "sample",
    treatment_key: str = "treatment",
    representation: str = "X_pca",
    num_components: int | None = None,
) -> CellPopulations:
    """Pair the untreated cells of every sample with its cells after each treatment.

    A sample is a patient, a donor or a replicate. Samples that lack untreated cells, or treated ones, give no population.

    Args:
        adata: An ``anndata.AnnData``, or anything with ``obs`` and ``obsm``.
        untreated: The label of cells without treatment in the column ``treatment_key``.
        sample_key: The column of ``adata.obs`` that names the sample of each cell.
        treatment_key: The column of ``adata.obs`` that names the treatment of each cell.
        representation: The key of ``adata.obsm`` with the coordinates of the cells.
        num_components: The number of leading columns to take; all if None.

    Raises:
        InvalidInputError: If a column or the representation doesn't exist, or no cell is untreated.
        EmptyDataError: If no sample has both kinds of cells.
        NonFiniteError: If a coordinate isn't finite.

    Example:
        >>> class Cells:  # anything with obs and obsm
        ...     obs = {"sample": np.repeat(["a", "b"], 20), "treatment": np.tile(["none", "drug"], 20)}
        ...     obsm = {"X_pca": np.random.default_rng(0).normal(size=(40, 3))}
        >>> found = populations_from_anndata(Cells(), "none")
        >>> found.samples, found.treatments, len(found.data.starts[0])
        (['a', 'b'], ['drug', 'drug'], 10)
    """
    sample = _column(adata, sample_key, "sample_key")
    treatment = _column(adata, treatment_key, "treatment_key")
    if representation not in adata.obsm:
        raise InvalidInputError(
            "adata has no such representation",
            got=repr(representation),
            expected=" | ".join(map(repr, adata.obsm)),
        )
    values = torch.as_tensor(np.asarray(adata.obsm[representation]), dtype=torch.get_default_dtype())
    if num_components is not None:
        check_positive_int(num_components, "num_components")
        values = values[:, :num_components]
    plain = treatment == str(untreated)
    if not plain.any():
        raise InvalidInputError(
            "no cell is untreated",
            got=repr(untreated),
            expected=" | ".join(map(repr, sorted(set(treatment))[:8])),
        )
    names = sorted(set(treatment[~plain]))
    codes = {str(name): torch.eye(len(names))[j] for j, name in enumerate(names)}
    starts, targets, given, owners = [], [], [], []
    for own in sorted(set(sample)):
        mine = sample == own
        for name in names:
            treated = mine & (treatment == name)
            if (mine & plain).any() and treated.any():
                starts.append(values[torch.from_numpy(mine & plain)])
                targets.append(values[torch.from_numpy(treated)])
                given.append(str(name))
                owners.append(str(own))
    if not starts:
        raise EmptyDataError("no sample has untreated and treated cells", got=f"{len(set(sample))} samples")
    data = Populations(starts, targets, torch.stack([codes[name] for name in given]), owners)
    return CellPopulations(data, owners, given, codes)


def _column(adata: Any, key: str, name: str) -> np.ndarray:
    obs = getattr(adata, "obs", None)
    if obs is None or key not in obs:
        raise InvalidInputError(
            f"{name} isn't a column of adata.obs",
            got=repr(key),
            expected=" | ".join(map(repr, list(obs)[:8])) if obs is not None else "an AnnData",
        )
    return np.asarray(obs[key]).astype(str)
