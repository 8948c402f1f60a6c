"""Fixtures for every test: one seed, and a guard that no test leaves a torch global changed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# A shell without job control starts its background programs deaf to Ctrl-C; the tests that press it need an ear.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed_and_guard() -> Iterator[None]:
    torch.manual_seed(20240229)
    np.random.seed(20240229)
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    torch.set_default_dtype(before[0])
    torch.set_grad_enabled(before[1])
    assert after == before, f"the test left torch globals changed: {after} instead of {before}"
    pyro = sys.modules.get("pyro")
    if pyro is not None:
        pyro.clear_param_store()
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        # Figures are kept until they are closed, and more than twenty raise a warning, which is an error here.
        pyplot.close("all")
