"""Snapshots from AnnData and npz files, and principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import Snapshots, from_anndata, from_npz, pca


class Cells:
    """What of an AnnData is read."""

    def __init__(self, n=12, d=4):
        rng = np.random.default_rng(0)
        self.obs = {
            "hour": np.repeat([24.0, 0.0, 12.0], n // 3),
            "day": np.repeat(["d1", "d0", "other"], n // 3),
            "mass": np.arange(1.0, n + 1),
        }
        self.obsm = {"X_pca": rng.normal(size=(n, d)), "X_umap": rng.normal(size=(n, 2))}
        self.X = self.obsm["X_pca"]


def test_cells_are_sorted_by_time():
    cells = Cells()
    snaps = from_anndata(cells, "hour", weights_key="mass")
    assert snaps.times.tolist() == [0.0, 12.0, 24.0]
    assert np.array_equal(snaps.samples[2].numpy(), cells.obsm["X_pca"][:4])
    assert torch.allclose(snaps.weights[2], torch.tensor([1.0, 2, 3, 4], dtype=torch.float64) / 10)
    assert torch.equal(snaps.masses, torch.tensor([26.0, 42.0, 10.0], dtype=torch.float64))


def test_categories_components_and_representations():
    cells = Cells()
    snaps = from_anndata(cells, "day", num_components=2, times={"d0": 0.0, "d1": 1.5}, dtype=torch.float32)
    assert snaps.times.tolist() == [0.0, 1.5]
    assert snaps.sizes == (4, 4)
    assert snaps.dtype == torch.float32
    assert snaps.dim == 2
    assert from_anndata(cells, "hour", "X_umap").dim == 2
    assert from_anndata(cells, "hour", None).dim == 4


def test_a_real_anndata_and_its_file(tmp_path):
    anndata = pytest.importorskip("anndata")
    pd = pytest.importorskip("pandas")
    cells = Cells()
    adata = anndata.AnnData(
        X=cells.X.astype(np.float32),
        obs=pd.DataFrame(
            {"hour": pd.Categorical(cells.obs["hour"])},
            index=pd.Index([f"c{i}" for i in range(12)], dtype=object),
        ),
        obsm={"X_pca": cells.obsm["X_pca"]},
    )
    snaps = from_anndata(adata, "hour")
    assert snaps.times.tolist() == [0.0, 12.0, 24.0]
    adata.var.index = adata.var.index.astype(object)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    again = from_anndata(tmp_path / "cells.h5ad", "hour")
    assert torch.equal(again.samples[1], snaps.samples[1])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"time_key": "week"}, sd.errors.InvalidInputError, "week"),
        ({"time_key": "day"}, sd.errors.InvalidInputError, "no numbers"),
        ({"time_key": "hour", "representation": "X_phate"}, sd.errors.InvalidInputError, "X_phate"),
        ({"time_key": "hour", "num_components": 9}, sd.errors.ShapeError, "components"),
        ({"time_key": "hour", "weights_key": "no"}, sd.errors.InvalidInputError, "weights_key"),
        ({"time_key": "day", "times": {"d0": 0.0}}, sd.errors.TimeGridError, "times"),
    ],
)
def test_bad_cells(options, error, words):
    with pytest.raises(error, match=words):
        from_anndata(Cells(), **options)
    with pytest.raises(sd.errors.InvalidInputError, match="AnnData"):
        from_anndata([1, 2], "hour")


def test_nan_cells_and_times():
    cells = Cells()
    cells.obsm["X_pca"][3, 1] = np.nan
    with pytest.raises(sd.errors.NonFiniteError, match=r"samples\[2\]"):
        from_anndata(cells, "hour")
    cells.obs["hour"][0] = np.nan
    with pytest.raises(sd.errors.NonFiniteError, match="times"):
        from_anndata(cells, "hour", "X_umap")


def test_npz_layouts(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3))
    np.savez(tmp_path / "a.npz", pcs=x, sample_labels=np.array([1, 0, 0, 1, 2, 2]))
    a = from_npz(tmp_path / "a.npz", "pcs", "sample_labels", num_components=2)
    assert a.times.tolist() == [0.0, 1.0, 2.0]
    assert np.array_equal(a.samples[1].numpy(), x[[0, 3], :2])
    later = from_npz(tmp_path / "a.npz", "pcs", "sample_labels", times=[0.0, 12.0, 36.0])
    assert later.times.tolist() == [0.0, 12.0, 36.0]
    np.savez(tmp_path / "b.npz", data=x.reshape(2, 3, 3))
    assert from_npz(tmp_path / "b.npz").sizes == (3, 3)
    np.savez(tmp_path / "c.npz", t10=x[:1], t2=x[:4], t0=x)
    c = from_npz(tmp_path / "c.npz", times=[0.0, 2.0, 10.0])
    assert c.sizes == (6, 4, 1)


def test_bad_npz(tmp_path):
    np.savez(tmp_path / "a.npz", pcs=np.zeros((6, 3)), day=np.arange(6) // 3)
    with pytest.raises(sd.errors.InvalidInputError, match="nothing"):
        from_npz(tmp_path / "a.npz", "nothing")
    with pytest.raises(sd.errors.InvalidInputError, match="labels need"):
        from_npz(tmp_path / "a.npz", labels="day")
    with pytest.raises(sd.errors.ShapeError, match="label"):
        from_npz(tmp_path / "a.npz", "pcs", "day", times=[0.0])
    with pytest.raises(sd.errors.ShapeError, match="array of cells"):
        from_npz(tmp_path / "a.npz")


def test_principal_components():
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, dtype=torch.float64, generator=g)
    snaps = Snapshots(
        [0.0, 1.0], [torch.randn(n, 4, dtype=torch.float64, generator=g) @ mix for n in (200, 50)]
    )
    turned = pca(snaps, 4)
    distance = torch.pdist(snaps.samples[1])
    assert torch.allclose(torch.pdist(turned.samples[1]), distance)
    white = pca(snaps, 2, whiten=True)
    weights = torch.cat(list(white.weights)) / 2
    everything = torch.cat(white.samples)
    cov = everything.mT @ (weights[:, None] * everything)
    assert torch.allclose(cov, torch.eye(2, dtype=torch.float64), atol=1e-10)
    assert turned.map(lambda x: x[:, :1]).samples[0].var() > turned.map(lambda x: x[:, 3:]).samples[0].var()
    with pytest.raises(sd.errors.InvalidInputError, match="fewer"):
        pca(snaps, 5)
