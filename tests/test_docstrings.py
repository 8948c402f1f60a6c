"""Examples in docstrings: each one can be read by Python, and gives what it says."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import pkgutil
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import stochdyn as sd

PACKAGES = sorted(m.name for m in pkgutil.iter_modules(sd.__path__) if not m.name.startswith("_"))


def modules(package: str) -> Iterator[ModuleType]:
    """Yield a package and all modules in it."""
    top = importlib.import_module(f"stochdyn.{package}")
    yield top
    for found in pkgutil.walk_packages(getattr(top, "__path__", []), f"{top.__name__}."):
        yield importlib.import_module(found.name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_example_parses(package: str) -> None:
    for module in modules(package):
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            for example in test.examples:
                ast.parse(example.source)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_every_example_gives_what_it_says(package: str) -> None:
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for module in modules(package):
        torch.manual_seed(0)
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()
