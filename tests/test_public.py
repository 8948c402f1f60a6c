"""`import stochdyn` is cheap: names load on first use, and heavy libraries not before they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import stochdyn as sd

HEAVY = (
    "ot",
    "gpytorch",
    "linear_operator",
    "matplotlib",
    "arviz",
    "qutip",
    "sklearn",
    "torchsde",
    "torchdiffeq",
)


def _fresh(code: str) -> str:
    """Run code in a new interpreter and return what it prints last."""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return out.stdout.strip().splitlines()[-1]


def test_import_loads_no_heavy_library() -> None:
    code = "import json, sys, stochdyn; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    loaded = set(json.loads(_fresh(code)))
    assert not loaded & set(HEAVY)
    assert "torch" not in loaded


def test_the_core_loads_no_pyro_and_no_heavy_library() -> None:
    code = (
        "import json, sys, stochdyn as sd;"
        "sd.SDE, sd.DiffusionMeasure, sd.PathELBO, sd.Brownian, sd.PathSample, sd.Estimate;"
        "print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    )
    assert not set(json.loads(_fresh(code))) & {*HEAVY, "pyro"}


def test_import_adds_little_to_that_of_pyro() -> None:
    """The best of four runs, in processor time, since the machine may be busy; the promise is 0.3 seconds."""
    code = (
        "import time, pyro; a = time.process_time(); import stochdyn;"
        "stochdyn.SDE, stochdyn.DiffusionMeasure, stochdyn.PathELBO; print(time.process_time() - a)"
    )
    assert min(float(_fresh(code)) for _ in range(4)) < 0.3


@pytest.mark.parametrize("name", [n for n in sd.__all__ if not n.startswith("__")])
def test_every_public_name_exists_and_says_what_it_is(name: str) -> None:
    value = getattr(sd, name)
    assert value.__doc__
    assert name in dir(sd)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="No stochdyn attribute SED"):
        sd.SED  # noqa: B018
