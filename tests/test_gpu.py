"""Every objective trains on a GPU, and gives there what it gives on the processor; skipped where there is none."""

from __future__ import annotations

import copy

import pytest
import torch

import stochdyn as sd
from stochdyn._checks import values_unchecked
from tests.test_asynchrony import OBJECTIVES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_on_the_device(name: str) -> None:
    torch.manual_seed(0)
    objective, batch = OBJECTIVES[name]()
    data = None if batch is None or not isinstance(batch, torch.Tensor | tuple) else batch
    if data is None and batch is not None:
        pytest.skip("its batches aren't plain tensors")
    result = sd.fit(objective, data, steps=3, progress=False, device="cuda")
    assert {p.device.type for p in objective.parameters()} == {"cuda"}
    assert bool(torch.isfinite(result.losses).all())


@pytest.mark.parametrize("name", ["LatentSDE, gaussian", "GaussianELBO"])
def test_an_exact_bound_is_the_same_on_both_devices(name: str) -> None:
    torch.manual_seed(0)
    objective, batch = OBJECTIVES[name]()
    other = copy.deepcopy(objective).cuda()
    there = None if batch is None else batch.to("cuda")
    with torch.no_grad():
        here, away = objective(batch), other(there)
    assert here.terms["kl"].item() == pytest.approx(away.terms["kl"].item(), rel=1e-3, abs=1e-4)


def test_the_step_of_a_fit_does_not_wait() -> None:
    """Torch itself raises where a step waits for the device."""
    torch.manual_seed(0)
    objective, _ = OBJECTIVES["PathELBO"]()
    sd.fit(objective, steps=3, progress=False, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with values_unchecked():
            for _ in range(3):
                objective(None).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
