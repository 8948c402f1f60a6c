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


@pytest.fixture
def shuffled():
    """Three days of two types, in random order, as after concatenating and shuffling."""
    anndata = pytest.importorskip("anndata")
    pandas = pytest.importorskip("pandas")
    r = np.random.default_rng(0)
    day, kind = np.repeat([0.0, 1.0, 2.0], [12, 15, 18]), np.tile(["left", "right"], 23)[:45]
    cells = 0.2 * r.normal(size=(45, 3)) + np.where(kind == "left", -2.0, 2.0)[:, None] + day[:, None]
    order = r.permutation(45)
    with pandas.option_context("mode.string_storage", "python"):  # AnnData can't write strings of Arrow
        obs = pandas.DataFrame({"day": day[order], "type": kind[order]}, index=[f"cell{i}" for i in order])
        return anndata.AnnData(np.zeros((45, 2)), obs=obs, obsm={"X_pca": cells[order]})


@pytest.mark.parametrize("growing", [False, True])
def test_results_go_back_to_the_cells_they_belong_to(shuffled, tmp_path, growing):
    snaps = sd.bridges.from_anndata(shuffled, "day")
    assert [name[:4] for name in snaps.names[0]] == ["cell"] * 12
    if growing:
        result = sd.bridges.GrowingBridge(snaps, diffusion=0.7).solve()
    else:
        result = sd.bridges.refine(snaps, sd.bridges.LinearDrift(3), diffusion=0.7, max_iterations=2)
    seen = shuffled[snaps.names[2]].obs["type"]
    out = sd.bridges.to_anndata(result, shuffled, labels=list(seen))
    assert out is shuffled
    velocity = out.obsm["stochdyn_velocity"]
    assert np.abs(velocity.mean(0) - 1).max() < 0.4
    moves = out.obsp["stochdyn_transitions"]
    assert np.abs(np.asarray(moves.sum(1)).ravel() - 1).max() < 1e-9
    day = out.obs["day"].to_numpy()
    rows, columns = moves.nonzero()
    assert set((day[columns] - day[rows])[day[rows] < 2]) == {1.0}
    right = out.obs["stochdyn_fate_right"].to_numpy()
    assert right[(out.obs["type"] == "right").to_numpy()].mean() > 0.95  # a few cross, since shares differ
    assert right[(out.obs["type"] == "left").to_numpy()].mean() < 0.05
    assert np.isfinite(out.obs["stochdyn_growth"]).all()
    pytest.importorskip("anndata").settings.allow_write_nullable_strings = True
    out.write_h5ad(tmp_path / "cells.h5ad")
    back = pytest.importorskip("anndata").read_h5ad(tmp_path / "cells.h5ad")
    assert back.uns["stochdyn"]["times"].tolist() == [0.0, 1.0, 2.0]
    fresh = sd.bridges.to_anndata(result)
    assert fresh.shape == (45, 3)
    some = sd.bridges.from_anndata(shuffled, "day").subsample(8, 0)
    part = sd.bridges.to_anndata(
        sd.bridges.SchrodingerBridge(some, diffusion=1.0).solve(), shuffled, key="part"
    )
    assert np.isnan(part.obsm["part_velocity"]).any(1).sum() == 45 - 24
    with pytest.raises(sd.errors.InvalidInputError, match="lacks cells"):
        sd.bridges.to_anndata(result, type(shuffled)(np.zeros((3, 2))))


def test_cellrank_reads_the_transitions_and_finds_the_same_fates(shuffled):
    cellrank = pytest.importorskip("cellrank")
    pandas = pytest.importorskip("pandas")
    snaps = sd.bridges.from_anndata(shuffled, "day")
    law = sd.bridges.SchrodingerBridge(snaps, diffusion=0.7).solve()
    out = sd.bridges.to_anndata(law, shuffled, labels=list(shuffled[snaps.names[2]].obs["type"]))
    kernel = cellrank.kernels.PrecomputedKernel(out.obsp["stochdyn_transitions"], adata=out)
    assert abs(kernel.transition_matrix - out.obsp["stochdyn_transitions"]).max() < 1e-12
    last = out.obs["day"] == 2.0
    out.obs["ends"] = pandas.Categorical(
        [t if d else None for t, d in zip(out.obs["type"], last, strict=True)]
    )
    estimator = cellrank.estimators.GPCCA(kernel)
    estimator.set_terminal_states(out.obs["ends"])
    estimator.compute_fate_probabilities()
    theirs = np.asarray(estimator.fate_probabilities["right"]).ravel()
    # rows keep all but a thousandth of their weight
    assert np.abs(theirs - out.obs["stochdyn_fate_right"].to_numpy())[~last].max() < 3e-3


def test_lineages_over_several_days():
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(n, 2, generator=g, dtype=torch.float64) + 0.5 * k for k, n in enumerate((6, 9, 7))]
    law = sd.bridges.SchrodingerBridge(
        Snapshots([0.0, 1.0, 2.0], clouds), diffusion=0.8, tolerance=1e-10
    ).solve()
    whole = law.coupling(0, 2)
    torch.testing.assert_close(whole.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(whole.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64), atol=1e-8, rtol=0)
    matrix = law.transition_matrix(0, -1)
    torch.testing.assert_close(matrix, 6 * whole)
    torch.testing.assert_close(law.descendants([2], 0, 2), matrix[2])
    torch.testing.assert_close(law.ancestors([3], 0, 2), 7 * whole[:, 3], atol=1e-7, rtol=0)
    classes, chances = law.fates(["a", "b", "a", "a", "b", "b", "a"])
    assert classes == ["a", "b"]
    torch.testing.assert_close(chances[:, 0], matrix[:, [0, 2, 3, 6]].sum(1))
    first, second = ["x", "y", "x", "y", "y", "x"], ["a", "b", "a", "a", "b", "b", "a"]
    before, after, table = law.transition_table((first, second))
    assert (before, after) == (["x", "y"], ["a", "b"])
    torch.testing.assert_close(table[0], chances[[0, 2, 5]].mean(0))
    torch.testing.assert_close(table.sum(1), torch.ones(2, dtype=torch.float64))
    for bad in (
        lambda: law.transition_table(first),
        lambda: law.transition_table((first, first)),
        lambda: law.coupling(1, 0),
        lambda: law.coupling(0, 5),
        lambda: law.fates(["a"]),
        lambda: law.descendants([9], 0, 1),
    ):
        with pytest.raises(sd.errors.StochdynError):
            bad()


def test_sparse_cells_are_read():
    sparse = pytest.importorskip("scipy.sparse")

    class Cells:
        obs = {"day": np.array([0.0, 1.0, 0.0])}  # noqa: RUF012
        obsm = {"X_pca": sparse.csr_matrix(np.eye(3))}  # noqa: RUF012

    assert from_anndata(Cells(), "day").sizes == (2, 1)
    Cells.obsm = {"X_pca": np.array([["a"], ["b"], ["c"]])}
    with pytest.raises(sd.errors.ShapeError, match="X_pca"):
        from_anndata(Cells(), "day")


@pytest.mark.parametrize(
    "column", [["2024-01-01", "2024-01-03"], [np.timedelta64(1, "D"), np.timedelta64(3, "D")]]
)
def test_dates_need_a_unit(column) -> None:
    days = np.array(column, dtype="datetime64[ns]" if isinstance(column[0], str) else "timedelta64[ns]")

    class Cells:
        obs = {"day": np.repeat(days, 3)}  # noqa: RUF012
        obsm = {"X_pca": np.arange(12.0).reshape(6, 2)}  # noqa: RUF012

    with pytest.raises(sd.errors.InvalidInputError, match="Timedelta"):
        from_anndata(Cells(), "day")
