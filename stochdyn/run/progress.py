"""The progress bar of everything that may take long: it appears only after two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stochdyn._checks import check_bool, check_type

__all__ = ["progress_bar"]

# Seconds of work before a bar appears: what is done by then needs none.
DELAY = 2.0


def progress_bar(
    items: Iterable[Any] | float | None,
    what: str,
    progress: bool = True,
    *,
    initial: float = 0,
    unit: str = "it",
) -> Any:
    """Return a bar over items, or one that counts up to a total; it appears when the work has taken two seconds.

    Long runs get theirs from :func:`stochdyn.run.run_to_end`; this is for loops whose steps needn't be kept.

    Args:
        items: What to iterate over, or the total of a bar that is moved by ``bar.update()``; None is a bar without a
            total.
        what: The name of the work, at the bar's left.
        progress: Whether to show a bar at all.
        initial: Where a bar with a total begins.
        unit: What is counted.

    Raises:
        InvalidInputError: If ``progress`` isn't a bool, or ``items`` neither a number nor iterable.

    Example:
        >>> sum(k for k in progress_bar(range(4), "adding"))
        6
        >>> with progress_bar(10, "waiting") as bar:
        ...     bar.update(10)
    """
    from tqdm.auto import tqdm

    check_bool(progress, "progress")
    settings: dict[str, Any] = {"desc": what, "disable": not progress, "delay": DELAY, "unit": unit}
    if items is None or isinstance(items, int | float):
        if isinstance(items, float):
            # A total that is no count, such as a time: without this the bar shows all sixteen digits.
            settings["bar_format"] = (
                "{l_bar}{bar}| {n:.4g}/{total:.4g} {unit} [{elapsed}<{remaining}{postfix}]"
            )
        return tqdm(total=items, initial=initial, **settings)
    check_type(items, Iterable, "items")
    return tqdm(items, **settings)
