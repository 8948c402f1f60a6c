"""Frames that differ from site to site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_nonempty
from stochdyn.errors import FrameError, InvalidInputError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.operators import as_state

__all__ = ["SiteFrames"]


class SiteFrames:
    """One frame a site, all with the same number of outcomes and levels.

    Takes the place of a :class:`Frame` wherever a measurement of the whole lattice is meant.

    Args:
        frames: one for each site.

    Raises:
        FrameError: if they differ in the number of outcomes or levels.

    Example:
        >>> from stochdyn.povm import FourPauli, Tetrahedral
        >>> SiteFrames([Tetrahedral(), FourPauli()]).probabilities("up")
        tensor([[0.3943, 0.1057, 0.1057, 0.3943],
                [0.3333, 0.1667, 0.1667, 0.3333]], dtype=torch.float64)
    """

    def __init__(self, frames: Sequence[Frame]) -> None:
        check_nonempty(frames, "frames")
        self.frames = tuple(frames)
        sizes = {(frame.num_outcomes, frame.dim) for frame in self.frames}
        if len(sizes) > 1:
            raise FrameError(
                "all sites need the same number of outcomes and levels",
                got=" and ".join(f"{k} outcomes on {d} levels" for k, d in sorted(sizes)),
            )
        self.num_outcomes, self.dim = sizes.pop()
        self.name = "SiteFrames"

    @property
    def num_sites(self) -> int:
        """How many sites."""
        return len(self.frames)

    def __repr__(self) -> str:
        return f"SiteFrames({', '.join(frame.name for frame in self.frames)})"

    def at(self, site: int) -> Frame:
        """Return the frame of a site."""
        return self.frames[site]

    def probabilities(self, state: Any) -> Tensor:
        """Return outcome probabilities ``(N, K)`` of a product state: one state, or a list with one a site."""
        return torch.stack([f.probabilities(s) for f, s in zip(self.frames, self._each(state), strict=True)])

    def positive_probabilities(self, state: Any) -> Tensor:
        """Return :meth:`probabilities`, all of them above zero.

        Raises:
            ZeroProbabilityError: if an outcome never happens.
        """
        return torch.stack(
            [f.positive_probabilities(s) for f, s in zip(self.frames, self._each(state), strict=True)]
        )

    def _each(self, state: Any) -> list[Any]:
        if isinstance(state, (list, tuple)) and all(isinstance(s, str) or hasattr(s, "shape") for s in state):
            if len(state) != self.num_sites:
                raise InvalidInputError(
                    "a product state needs one state for each site", got=len(state), expected=self.num_sites
                )
            return [as_state(s, self.dim) for s in state]
        return [state] * self.num_sites
