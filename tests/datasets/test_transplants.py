"""The shipped panel is the published one, and has its published fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.datasets import heart_transplants
from stochdyn.jumps import PanelData, fit_rates


def test_the_panel_has_its_published_likelihood() -> None:
    panel = PanelData(heart_transplants()._asdict(), "subject", "years", "state", exact_entry=[4])
    counts = torch.tensor([[1367, 204, 44, 148], [46, 134, 54, 48], [4, 13, 107, 55]]).double()
    assert torch.equal(panel.counts()[:3], counts)
    mask = np.zeros((4, 4), bool)
    for i, j in ((0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3)):
        mask[i, j] = True
    fit = fit_rates(panel, mask, prior=(-1.0, 1.5), num_draws=100)
    assert -2 * fit.log_likelihood == pytest.approx(3968.7979, abs=1e-3)
    published = [0.12787, 0.04249, 0.22510, 0.34260, 0.04027, 0.13062, 0.30646]
    found = [float(fit.rates[i, j]) for i, j in fit.links.tolist()]
    assert found == pytest.approx(published, rel=2e-3)
