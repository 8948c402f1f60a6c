"""Names under which guides stand in Pyro's store of parameters: no two guides of a session share one."""

from __future__ import annotations

from collections import Counter

from pyro.nn import PyroModule

__all__ = ["fresh_name", "rename"]

_TAKEN: Counter[str] = Counter()


def fresh_name(base: str) -> str:
    """Return ``base``, followed by a number from the second time on.

    Pyro's store keeps parameters by name beyond the life of their module. A second module of the same name would have the
    parameters of the first one optimised in place of its own.
    """
    _TAKEN[base] += 1
    return base if _TAKEN[base] == 1 else f"{base}_{_TAKEN[base]}"


def rename(module: PyroModule, base: str) -> None:
    """Give a module and all within it a fresh name, as a copy of another one needs it."""
    old, new = module._pyro_name, fresh_name(base)
    for part in module.modules():
        if isinstance(part, PyroModule) and (part._pyro_name + ".").startswith(old + "."):
            part._pyro_name = new + part._pyro_name[len(old) :]
