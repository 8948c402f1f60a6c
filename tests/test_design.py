"""The page on the design names what is there: files, layers and packages."""

from __future__ import annotations

import re
from pathlib import Path

import stochdyn as sd

ROOT = Path(sd.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "design.md"


def test_every_file_that_the_design_names_exists() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE.read_text(encoding="utf-8"))
    places = (ROOT, ROOT.parent, ROOT / "bridges")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert named
    assert not missing


def test_every_package_has_a_layer() -> None:
    text = PAGE.read_text(encoding="utf-8")
    layers = text.split("```text")[1].split("```")[0]
    packages = [p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()]
    assert [name for name in packages if not re.search(rf"\b{name}\b", layers)] == []


def test_every_folder_of_the_core_is_told() -> None:
    text = PAGE.read_text(encoding="utf-8")
    folders = [p.name for p in (ROOT / "core").iterdir() if (p / "__init__.py").exists()]
    assert [name for name in folders if f"`core/{name}`" not in text] == []
