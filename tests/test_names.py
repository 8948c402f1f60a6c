"""Names and surface: what a package shows is what it documents, and nothing hides behind anything else."""

from __future__ import annotations

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import stochdyn as sd

PACKAGES = [
    "stochdyn",
    *(m.name for m in pkgutil.walk_packages(sd.__path__, "stochdyn.") if m.ispkg),
]


def _exports(package: str) -> list[str]:
    """Return the names in a package's stub, which is the one table of its names."""
    stub = Path(str(importlib.import_module(package).__file__)).with_suffix(".pyi")
    return re.findall(r"^from \S+ import \w+ as (\w+)$", stub.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_shows_its_public_names_and_nothing_else(package: str) -> None:
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")  # loading a file must not add a name
    names = _exports(package)
    assert len(names) == len(set(names)), "a name stands twice"
    assert sorted(dir(module)) == sorted(names)
    for name in names:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_hides_behind_a_name_of_its_package(package: str) -> None:
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        inner = importlib.import_module(f"{package}.{info.name}")
        seen = getattr(module, info.name, inner)
        assert isinstance(seen, types.ModuleType), (
            f"{package}.{info.name} is a file and a {type(seen).__name__}"
        )


@pytest.mark.parametrize("package", [p for p in PACKAGES if p.count(".") == 1])
def test_every_public_name_says_what_it_is(package: str) -> None:
    module = importlib.import_module(package)
    undocumented = [n for n in dir(module) if not (getattr(module, n).__doc__ or "").strip()]
    assert not undocumented


def test_the_top_level_is_small_and_errors_live_in_one_place() -> None:
    assert len(dir(sd)) <= 45
    errors = [
        n for n in dir(sd) if isinstance(getattr(sd, n), type) and issubclass(getattr(sd, n), Exception)
    ]
    assert errors == ["StochdynError"]
    for name in sd.errors.__all__:
        assert getattr(sd, name) is getattr(sd.errors, name)
