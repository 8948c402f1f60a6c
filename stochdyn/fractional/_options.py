"""Options that the chosen method doesn't use are refused."""

from __future__ import annotations

from collections.abc import Mapping

from stochdyn.errors import InvalidInputError

__all__ = ["check_unused"]


def check_unused(options: Mapping[str, object], choice: str) -> None:
    """Raise if any of the options was given (isn't None), for they do nothing beside ``choice``.

    Raises:
        InvalidInputError: If one of the options was given; the message names them.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InvalidInputError(
            f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect with {choice}",
            hint="leave them out" if len(given) > 1 else "leave it out",
        )
