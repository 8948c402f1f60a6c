"""Docstrings in whole sentences: every argument, attribute and error says by itself what it is."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import stochdyn as sd

ROOT = Path(sd.__file__).parent
PARTS = sorted(m.name for m in pkgutil.iter_modules(sd.__path__))

#: How many entries of a package still begin in the middle of a sentence; to be lowered, not raised.
KNOWN = {"infer": 60}
#: How many docstrings only point elsewhere.
KNOWN_SEE: dict[str, int] = {}


def docstrings(part: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every docstring of a package or a module."""
    folder = ROOT / part
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{part}.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text:
                    yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', '')}", text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and description of every argument, attribute and error of a docstring."""
    inside = False
    for line in text.splitlines():
        if re.match(r"^(Args|Attributes|Raises|Warns):", line):
            inside = True
            continue
        if line and not line.startswith(" "):
            inside = False
        found = re.match(r"^    (\*{0,2}\w[\w, *]*)(?: \(.*?\))?: (.*)$", line)
        if inside and found:
            yield found.group(1), found.group(2)


@pytest.mark.parametrize("part", PARTS)
def test_descriptions_begin_a_sentence(part: str) -> None:
    fragments = [
        f"{place}: {name}: {what}"
        for place, text in docstrings(part)
        for name, what in entries(text)
        if what and what[0].islower()
    ]
    assert len(fragments) <= KNOWN.get(part, 0), "\n".join(fragments)


@pytest.mark.parametrize("part", PARTS)
def test_no_docstring_only_points_elsewhere(part: str) -> None:
    found = [
        f"{place}: {text}" for place, text in docstrings(part) if text.startswith("See ") and "\n" not in text
    ]
    assert len(found) <= KNOWN_SEE.get(part, 0), "\n".join(found)
