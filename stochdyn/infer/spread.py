"""How far the paths of a posterior spread before it is trained, and whether they stay finite."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.errors import NonFiniteError
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.view import SiteView

__all__ = ["spread_of_paths"]

_PATHS = 8


def spread_of_paths(view: SiteView, feedback: Feedback | None, centre: Tensor) -> Tensor:
    """Return the spread of the full state around ``centre (N, *batch, Z)``, over time and a few simulated paths, ``(Z,)``.

    Args:
        view: The site as the model presents it.
        feedback: The law of the increments; None for that of the prior.
        centre: The path around which they spread.

    Raises:
        NonFiniteError: If a path explodes, so that neither a bound nor its gradient would be finite.
    """
    generator = torch.Generator(centre.device).manual_seed(0)
    with torch.no_grad():
        squares = []
        for _ in range(_PATHS):
            zero = view.zero_increments()
            e = torch.randn(zero.shape, generator=generator, dtype=zero.dtype, device=zero.device)
            states = view.run(e * view.units(e.ndim), feedback=feedback)
            seen = states[1:] if feedback is None else feedback.remembered(states)[1:]
            squares.append(((seen - centre) ** 2).flatten(0, -2).mean(0))
        finite = torch.stack([torch.isfinite(square).all() for square in squares])
        if not bool(finite.all()):
            law = (
                "the prior" if feedback is None else "the posterior linearised around the most probable path"
            )
            raise NonFiniteError(
                f"paths {view.path_name!r} explode",
                got=f"{int((~finite).sum())} of {_PATHS} draws of {law}",
                hint="take a finer grid, or coordinates in which the state can't leave its range (sde.transformed('log'))",
            )
        width = torch.stack(squares).mean(0).sqrt()
    # What never moves but for rounding has the size of its values as its unit.
    size = centre.abs().flatten(0, -2).amax(0)
    good = width > 16 * torch.finfo(width.dtype).eps * size
    return torch.where(good, width, torch.where(size > 0, size, torch.ones_like(size)))
