"""What users met in version 0.1.0, in today's words."""

from __future__ import annotations

import warnings

import pytest
import torch

from stochdyn.errors import ConvergenceWarning
from stochdyn.povm import (
    TDVP,
    AutoregressiveTransformer,
    AutoregressiveWindow,
    Lindbladian,
    Relaxation,
    Tetrahedral,
    evolve,
    exact,
    purity,
    ring,
    steady_state,
    systems,
)

POVM = Tetrahedral()


def test_strings_that_aren_t_symmetries_of_the_model_are_said() -> None:
    n = 4
    model = Lindbladian(n, [(0.5, "ZZ", ring(n)), ([1.5, 0, 0, 0], "X", "all")], [(1.0, "sigma-", "all")])
    torch.manual_seed(0)
    net = AutoregressiveTransformer(n, layers=1, width=12, heads=2, strings="translations").double()
    net.set_product_state(POVM, "up")
    with pytest.warns(ConvergenceWarning, match="isn't symmetric under the strings"):
        run = evolve(net, model, POVM, [0.0, 0.2], TDVP(dt=0.1), None, {"z": ("Z", 0)}, progress=False)
    right = exact.evolve(model, "up", [0.0, 0.2], {"z": ("Z", 0)}, backend="matrix").expect["z"]
    assert abs(float(run.expect["z"][-1] - right[-1])) > 0.01


@pytest.mark.slow
def test_an_unphysical_steady_state_is_said() -> None:
    """Steps too long for directions that noise stirs up break the symmetry of X and leave the physical states."""
    torch.manual_seed(0)
    net = AutoregressiveWindow(8, order=2).double().set_product_state(POVM, "up")
    method = Relaxation(8.0, evolution=TDVP(dt=0.1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = steady_state(net, systems.xyz(8, 0.9, 1.2, 1.0), POVM, method, 1200, progress=False)
    assert any("unphysical" in str(w.message) for w in told)
    assert found.positivity is not None
    assert found.positivity.worst[1] < -0.1


def test_residuals_of_evolutions_lie_between_zero_and_one() -> None:
    net = AutoregressiveWindow(6, order=2).double().set_product_state(POVM, "up")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        run = evolve(
            net, systems.xyz(6, 0.9, 1.2, 1.0), POVM, [0.0, 0.5, 1.0], TDVP(dt=0.1), 60, progress=False
        )
    assert 0 <= float(run.residual.min()) <= float(run.residual.max()) <= 1
    assert float(run.steps["left_out"].max()) >= float(run.residual.max())


def test_purity_doesn_t_depend_on_the_order_of_the_draws() -> None:
    torch.manual_seed(0)
    net = AutoregressiveTransformer(2).double().set_product_state(POVM, "up")
    a, _ = net.sample(20000, generator=1, stratified=True)
    found = purity(POVM, a)
    assert abs(float(found.mean) - 1) < 5 * float(found.stderr)
