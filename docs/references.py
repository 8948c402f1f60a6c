"""Links of names that are not written as they are documented: public names (``stochdyn.bridges.refine``) and bare ones (``infer_hurst``).

Every object is documented once, in the file that defines it. A reference that Sphinx doesn't find there is looked up in Python, and a
full name that doesn't exist is a warning.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

from docutils.nodes import Element
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import stochdyn

logger = logging.getLogger(__name__)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("missing-reference", link)
    return {"parallel_read_safe": True}


def link(app: Any, env: Any, node: Any, content: Element) -> Element | None:
    """Return a link to where the object of a reference is documented, or None."""
    if node.get("refdomain") != "py":
        return None
    target, documented = node["reftarget"], env.get_domain("py").objects
    for name in _homes(target):
        if name in documented:
            found = documented[name]
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, name)
    if target.startswith("stochdyn.") and _find(target) is None:
        logger.warning("no such name: %s", target, location=node)
    return None


def _homes(target: str) -> list[str]:
    """Return the full names under which an object may be documented: for a member also those of the base classes."""
    full = target if target.startswith("stochdyn.") else _bare().get(target.split(".")[0])
    if full is None:
        return []
    if full != target and "." in target:
        full += target[target.index(".") :]
    owner, _, member = full.rpartition(".")
    parent = _find(owner)
    if inspect.isclass(parent):
        return [f"{base.__module__}.{base.__qualname__}.{member}" for base in parent.__mro__]
    value = _find(full)
    return [f"{value.__module__}.{value.__qualname__}"] if hasattr(value, "__qualname__") else []


def _find(name: str) -> Any:
    """Return the module or object of a full name, a class for its field without a default, or None."""
    value: Any = stochdyn
    for part in name.split(".")[1:]:
        inner = getattr(value, part, None)
        if inner is None and inspect.ismodule(value) and hasattr(value, "__path__"):
            try:
                inner = importlib.import_module(f"{value.__name__}.{part}")
            except ModuleNotFoundError:
                return None
        if inner is None and inspect.isclass(value):
            # fields of instances aren't attributes of the class
            inner = value
        if inner is None:
            return None
        value = inner
    return value


@functools.cache
def _bare() -> dict[str, str]:
    """Return the full name of every public class and function whose own name is unique in the package."""
    homes: dict[str, set[str]] = {}
    for info in pkgutil.walk_packages(stochdyn.__path__, "stochdyn."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == info.name and not name.startswith("_"):
                homes.setdefault(name, set()).add(f"{info.name}.{name}")
    return {name: found.pop() for name, found in homes.items() if len(found) == 1}
