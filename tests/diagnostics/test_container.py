"""The container holds what it was given, under the names that ArviZ looks for, in both of ArviZ's majors."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from stochdyn.diagnostics import container, from_draws
from stochdyn.diagnostics.container import arviz_major
from stochdyn.errors import EmptyDataError, InvalidInputError, MissingDependencyError, ShapeError

# No torch here either: this file also runs where only ArviZ is installed.

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")


def example_draws(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    mean = rng.normal(size=(2, 200))
    y = np.array([0.3, -0.1, 0.4])
    log_likelihood = -0.5 * (y - mean[..., None]) ** 2 - 0.5 * np.log(2 * np.pi)
    return {
        "posterior": {"mean": mean, "x": rng.normal(size=(2, 200, 4, 1))},
        "posterior_predictive": {"y": mean[..., None] + rng.normal(size=(2, 200, 3))},
        "log_likelihood": {"y": log_likelihood},
        "observed_data": {"y": y},
        "constant_data": {"x_ts": np.linspace(0, 1, 4)},
        "sample_stats": {"lp": log_likelihood.sum(-1) - 0.5 * mean**2},
    }


DIMS = {"x": ["x_time", "x_dim"], "x_ts": ["x_time"], "y": ["record"]}
COORDS = {"x_time": np.linspace(0, 1, 4), "record": ["a", "b", "c"]}


@pytest.fixture
def groups() -> dict[str, dict[str, np.ndarray]]:
    return example_draws(np.random.default_rng(0))


@pytest.fixture
def idata(groups):
    return from_draws(**groups, dims=DIMS, coords=COORDS, attrs={"estimator": "exact", "seed": 3})


def test_every_group_comes_back_bit_for_bit(groups, idata):
    for group, arrays in groups.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(idata[group][name].values, array)


def test_the_container_is_the_one_that_the_installed_arviz_uses(idata):
    assert type(idata).__name__ == ("InferenceData" if arviz_major() == 0 else "DataTree")


def test_axes_are_named_and_carry_their_coordinates(idata):
    assert idata["posterior"]["x"].dims == ("chain", "draw", "x_time", "x_dim")
    np.testing.assert_array_equal(idata["posterior"]["x_time"].values, COORDS["x_time"])
    assert idata["constant_data"]["x_ts"].dims == ("x_time",)
    assert idata["log_likelihood"]["record"].values.tolist() == ["a", "b", "c"]
    assert idata["observed_data"]["y"].dims == ("record",)


def test_axes_without_names_are_numbered_after_their_variable():
    idata = from_draws({"z": np.zeros((1, 5, 2, 3))}, dims={"z": ["left"]})
    assert idata["posterior"]["z"].dims == ("chain", "draw", "left", "z_dim_1")
    assert idata["posterior"]["z_dim_1"].values.tolist() == [0, 1, 2]


def test_names_of_event_axes_are_ignored_by_a_log_likelihood_without_them():
    idata = from_draws(
        {"z": np.zeros((1, 5))},
        log_likelihood={"y": np.zeros((1, 5, 7))},
        observed_data={"y": np.zeros((7, 2))},
        dims={"y": ["record", "component"]},
    )
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "record")
    assert idata["observed_data"]["y"].dims == ("record", "component")


def test_attributes_reach_the_root_and_every_group(idata):
    for attrs in (idata.attrs, idata["posterior"].attrs, idata["sample_stats"].attrs):
        assert attrs["inference_library"] == "stochdyn"
        assert attrs["inference_library_version"].count(".") == 2
        assert (attrs["estimator"], attrs["seed"]) == ("exact", 3)


def test_empty_groups_are_left_out():
    idata = from_draws({"z": np.zeros((1, 5))}, sample_stats={}, observed_data=None)
    names = {g.strip("/") for g in (idata.groups() if callable(idata.groups) else idata.groups)}
    assert names - {""} == {"posterior"}


def test_netcdf_round_trip_keeps_values_and_attributes(idata, groups, tmp_path):
    import xarray

    idata.to_netcdf(tmp_path / "idata.nc")
    with xarray.open_dataset(tmp_path / "idata.nc", group="posterior") as back:
        np.testing.assert_array_equal(back["x"].values, groups["posterior"]["x"])
        assert back.attrs["estimator"] == "exact"


def test_arviz_reads_it(idata, groups):
    import arviz

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        summary = arviz.summary(idata, var_names=["mean"])
        loo = arviz.loo(idata)
    assert float(summary.loc["mean", "mean"]) == pytest.approx(groups["posterior"]["mean"].mean(), abs=0.01)
    assert loo.n_data_points == 3


def test_a_data_tree_is_built_for_arviz_1(groups, monkeypatch):
    monkeypatch.setattr(container, "arviz_major", lambda: 1)
    tree = from_draws(**groups, dims=DIMS, coords=COORDS, attrs={"seed": 3})
    assert type(tree).__name__ == "DataTree"
    assert set(tree.children) == set(groups)
    assert tree.attrs["seed"] == 3
    assert tree["posterior/x"].dims == ("chain", "draw", "x_time", "x_dim")


Z = np.zeros((1, 5, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"posterior": {}}, EmptyDataError, "posterior is empty"),
        ({"posterior": {"z": np.zeros((1, 0))}}, EmptyDataError, "no draws"),
        ({"posterior": {"z": np.zeros(5)}}, ShapeError, "axes of chains and draws"),
        ({"sample_stats": {"lp": np.zeros((1, 4))}}, ShapeError, r"lp in sample_stats.*shape \(1, 4\)"),
        ({"coords": {"a": [1, 2]}}, ShapeError, r"coords\['a'\] doesn't fit 'z'"),
        (
            {"posterior": {"z": np.zeros((1, 5, 3)), "w": np.zeros((1, 5, 2))}},
            ShapeError,
            "'a' has two sizes",
        ),
        (
            {"posterior": {"z": np.zeros((1, 5, 3)), "a": np.zeros((1, 5))}},
            InvalidInputError,
            "name of a variable",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"posterior": {"z": Z}, "dims": {"z": ["a"], "w": ["a"]}}
    with pytest.raises(error, match=message):
        from_draws(**{**arguments, **change})


def test_a_missing_arviz_is_named(monkeypatch):
    def absent(name: str) -> str:
        raise container.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(container.importlib.metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match="ArviZ is not installed"):
        from_draws({"z": np.zeros((1, 5))})


def test_importing_it_imports_neither_torch_nor_pyro_nor_arviz():
    heavy = "{'torch', 'pyro', 'arviz', 'xarray', 'matplotlib'}"
    code = f"import sys, stochdyn.diagnostics.container; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
