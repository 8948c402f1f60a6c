"""Sphinx extension: a diagram of which package imports which, read off the source whenever the documentation is built."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import stochdyn

#: Layers from the top, as the linter enforces them.
LAYERS = [
    ["testing"],
    ["fractional", "interpolants", "bridges", "vectorfields", "povm", "jumps", "nonequilibrium"],
    ["infer", "diagnostics"],
    ["run"],
    ["objectives"],
    ["datasets"],
    ["core"],
    ["_checks", "_lending"],
    ["errors"],
]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect(
        "builder-inited", lambda app: draw(Path(app.srcdir) / "reference" / "generated" / "imports.png")
    )
    return {"parallel_read_safe": True}


def imports() -> dict[tuple[str, str], int]:
    """Return how many import statements lead from one package to another, those for annotations alone left out."""
    root = Path(str(stochdyn.__file__)).parent
    found: dict[tuple[str, str], int] = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if len(parts) == 1 and parts[0] in ("__init__.py", "_version.py"):
            continue
        here = parts[0].removesuffix(".py")
        for node in _run_time(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                there = (name or "").split(".")
                if there[0] == "stochdyn" and len(there) > 1 and there[1] != here:
                    found[here, there[1]] = found.get((here, there[1]), 0) + 1
    return found


def _run_time(tree: ast.AST) -> list[Any]:
    """Return import statements outside ``if TYPE_CHECKING``."""
    out: list[Any] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            out.append(node)
        out += _run_time(node)
    return out


def draw(path: Path) -> None:
    """Draw the diagram; the width of an arrow grows with the number of imports."""
    found = imports()
    known = {name for pair in found for name in pair}
    layers = [[name for name in layer if name in known] for layer in LAYERS]
    layers = [layer for layer in layers if layer]
    place = {
        name: ((i + 0.5) / len(layer), -float(row))
        for row, layer in enumerate(layers)
        for i, name in enumerate(layer)
    }
    figure, ax = plt.subplots(figsize=(8.0, 6.5))
    for (here, there), count in sorted(found.items()):
        if here not in place or there not in place:
            continue
        (x0, y0), (x1, y1) = place[here], place[there]
        style = {
            "arrowstyle": "-|>",
            "color": "0.55",
            "linewidth": 0.4 + 0.25 * count**0.5,
            "shrinkA": 12,
            "shrinkB": 12,
        }
        bend = "arc3,rad=0.15" if abs(y1 - y0) > 1 else "arc3,rad=0"
        ax.annotate("", (x1, y1), (x0, y0), arrowprops={**style, "connectionstyle": bend, "alpha": 0.6})
    for name, (x, y) in place.items():
        ax.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "round", "fc": "white", "ec": "0.3"},
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(-len(layers) + 0.5, 0.5)
    ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
