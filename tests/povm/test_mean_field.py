"""Mean field: exact without couplings, exact in its first step, and what it must refuse."""

from __future__ import annotations

import pytest
import torch

from stochdyn.core import all_configurations
from stochdyn.errors import InvalidInputError, LindbladianError, TimeGridError
from stochdyn.povm import (
    FourPauli,
    Lindbladian,
    SiteFrames,
    Tetrahedral,
    all_to_all,
    exact,
    mean_field,
    ring,
    systems,
)
from stochdyn.povm.master import marginal

F64, C128 = torch.float64, torch.complex128


def test_free_sites_are_exact_at_any_number() -> None:
    model, run = systems.reference("free_sites", 64)
    mine = mean_field.evolve(model, run.initial, run.times, ["X", "Y", "Z"])
    for name in "XYZ":
        assert float((mine.expect[name] - run.expect[name]).abs().max()) < 1e-8


def test_rates_of_marginals_are_exact_for_product_states() -> None:
    h3 = torch.randn(8, 8, dtype=C128)
    model = Lindbladian(
        4,
        [(0.7, "ZZ", ring(4)), (0.4, h3 + h3.mH, (2, 0, 3)), (0.3, "X", "all"), (lambda t: t, "XY", (0, 3))],
        [(1.0, "sigma-", "all"), (0.3, torch.randn(4, 4, dtype=C128), (1, 3))],
    )
    povm = SiteFrames([Tetrahedral(), FourPauli(), FourPauli(), Tetrahedral(rotated=False)])
    p = torch.rand(4, 4, dtype=F64)
    p = p / p.sum(1, keepdim=True)
    every = all_configurations(4, 4)
    joint = torch.stack([p[i, every[:, i]] for i in range(4)]).prod(0)
    operator = model.master_operator(povm)
    change = operator.apply(joint, 0.6)
    expected = torch.stack([marginal(change, [i], 4) for i in range(4)])
    torch.testing.assert_close(mean_field.marginal_rates(operator, p, 0.6), expected)


def test_it_becomes_exact_when_each_site_sees_many() -> None:
    """All-to-all couplings of strength 1/N: the error falls with the number of sites."""

    def error(n: int) -> float:
        terms = [(1.0 / (n - 1), "ZZ", all_to_all(n)), (0.5, "X", "all")]
        model = Lindbladian(n, terms, [(1.0, "sigma-", "all")])
        times = [0.0, 0.5, 1.0]
        right = exact.evolve(model, "y+", times, ["X", "Z"], backend="matrix", rtol=1e-8, atol=1e-10)
        mine = mean_field.evolve(model, "y+", times, ["X", "Z"])
        return max(float((mine.expect[k] - right.expect[k]).abs().max()) for k in ("X", "Z"))

    scaled = [(n - 1) * error(n) for n in (4, 6, 7)]
    assert max(scaled) < 1.1 * min(scaled), "the error is of first order in 1 / (N - 1)"


def test_observables_of_several_sites_are_products() -> None:
    run = mean_field.evolve(
        systems.ising(4),
        ["up", "x+", "y-", "down"],
        [0.0],
        {"a": ("ZX", (0, 1)), "b": "ZZ", "c": ("YZ", (2, 3))},
    )
    assert abs(float(run.expect["a"]) - 1) < 1e-12
    assert abs(float(run.expect["b"]) + 0.25) < 1e-12
    assert abs(float(run.expect["c"]) - 1) < 1e-12
    three = mean_field.evolve(Lindbladian(2, [(0.3, "Sx", "all")], dim=3), "mixed", [0.0, 1.0], ["Sz"])
    assert float(three.expect["Sz"].abs().max()) < 1e-12


BAD = {
    "times that fall": (lambda: mean_field.evolve(systems.ising(2), "up", [1.0, 0.0]), TimeGridError, "increase"),
    "too few states": (lambda: mean_field.evolve(systems.ising(2), ["up"], [0.0]), InvalidInputError, "one state for each site"),
    "an entangled state": (
        lambda: mean_field.evolve(systems.ising(2), torch.eye(4) / 4, [0.0]), InvalidInputError, "product"),
    "a rate that becomes negative": (
        lambda: mean_field.evolve(Lindbladian(1, [], [(lambda t: 1 - t, "sigma-", 0)]), "up", [0.0, 2.0], ["Z"]),
        LindbladianError, "negative at time 2"),
    "sites without a frame": (
        lambda: mean_field.evolve(Lindbladian(1, [(1.0, "Sx", 0)], dim=4), "mixed", [0.0], ["Sz"]),
        InvalidInputError, "Pass povm"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()
