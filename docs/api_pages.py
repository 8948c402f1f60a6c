"""Sphinx extension: one page per subpackage, listing every public module that exists, and a table of the public names.

The pages go to ``docs/reference/generated`` whenever the documentation is built, so a new module appears in
the reference without being listed by hand.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.util import logging

import stochdyn

logger = logging.getLogger(__name__)

# Subpackages in reading order; others follow by name.
ORDER = [
    "core",
    "objectives",
    "infer",
    "run",
    "diagnostics",
    "fractional",
    "interpolants",
    "bridges",
    "vectorfields",
    "povm",
    "jumps",
    "nonequilibrium",
    "datasets",
    "testing",
    "errors",
]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference" / "generated"))
    return {"parallel_read_safe": True}


def write_pages(folder: Path) -> None:
    """Write the pages, touching only those that changed."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = sorted(
        (m.name for m in pkgutil.iter_modules(stochdyn.__path__) if not m.name.startswith("_")),
        key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name),
    )
    pages = {"names.rst": _names_page()}
    pages |= {f"{package}.rst": _package_page(f"stochdyn.{package}") for package in packages}
    toctree = "\n".join(f"   {package}" for package in packages)
    pages["modules.rst"] = f"Modules\n=======\n\n.. toctree::\n   :maxdepth: 2\n\n{toctree}\n"
    for old in folder.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _package_page(name: str) -> str:
    module = importlib.import_module(name)
    title = f"``{name}``"
    lines = [title, "=" * len(title), ""]
    if not hasattr(module, "__path__"):
        return "\n".join([*lines, f".. automodule:: {name}", ""])
    lines += [f".. automodule:: {name}", "   :no-members:", "", *_inner(module, "-")]
    return "\n".join(lines)


def _inner(package: ModuleType, underline: str) -> list[str]:
    """Return the sections of a package's modules, folder by folder."""
    lines = []
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        inner = f"{package.__name__}.{info.name}"
        heading = f"``{inner}``"
        lines += [heading, underline * len(heading), "", f".. automodule:: {inner}"]
        if info.ispkg:
            lines += ["   :no-members:", "", *_inner(importlib.import_module(inner), "^")]
            continue
        if elsewhere := _defined_elsewhere(inner):
            lines.append(f"   :exclude-members: {', '.join(elsewhere)}")
        lines.append("")
    return lines


def _defined_elsewhere(name: str) -> list[str]:
    """Return the public names that a module takes from another one, which documents them."""
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    return [n for n in public if getattr(getattr(module, n), "__module__", name) != name]


def _names_page() -> str:
    rows = []
    for name in sorted(stochdyn.__all__, key=str.lower):
        try:
            value = getattr(stochdyn, name)
        except (ImportError, AttributeError) as error:
            logger.warning("stochdyn.%s can't be documented: %s", name, error)
            continue
        if isinstance(value, ModuleType) or name.startswith("_"):
            continue
        role = "class" if inspect.isclass(value) else "func"
        role = "exc" if inspect.isclass(value) and issubclass(value, BaseException) else role
        home = f"{value.__module__}.{value.__qualname__}"
        summary = (inspect.getdoc(value) or "").split("\n")[0]
        rows.append(f"   * - :{role}:`~{home}`\n     - {summary}")
    table = ".. list-table::\n   :widths: 30 70\n\n" + "\n".join(rows)
    return f"Names in ``stochdyn``\n{'=' * 22}\n\n{table}\n"


if __name__ == "__main__":
    write_pages(Path(__file__).parent / "reference" / "generated")
