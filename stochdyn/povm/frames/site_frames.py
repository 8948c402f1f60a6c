"""Frames that differ from site to site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_nonempty, check_type
from stochdyn.errors import FrameError
from stochdyn.povm.frames.frame import Frame, Measurement
from stochdyn.povm.frames.products import site_states

__all__ = ["SiteFrames"]


class SiteFrames:
    """One frame or measurement for each site, all with the same number of levels.

    When would I use this? Where readout errors or bases differ from site to site. It takes the place of a :class:`Frame`
    wherever a measurement of the whole lattice is meant. Measurements with fewer
    outcomes than others gain outcomes that never happen.

    Args:
        frames: The frames or measurements, one for each site.

    Raises:
        FrameError: If they differ in their levels, or complete frames in their number of outcomes.

    Example:
        >>> from stochdyn.povm import FourPauli, Tetrahedral
        >>> SiteFrames([Tetrahedral(), FourPauli()]).probabilities("up")
        tensor([[0.3943, 0.1057, 0.1057, 0.3943],
                [0.3333, 0.1667, 0.1667, 0.3333]], dtype=torch.float64)
    """

    def __init__(self, frames: Sequence[Measurement]) -> None:
        check_nonempty(frames, "frames")
        for i, frame in enumerate(frames):
            check_type(frame, Measurement, f"frames[{i}]", hint="such as stochdyn.povm.Tetrahedral()")
        self.frames = tuple(frames)
        sizes = {(frame.num_outcomes, frame.dim) for frame in self.frames}
        complete = all(isinstance(frame, Frame) for frame in self.frames)
        if len({d for _, d in sizes}) > 1 or (complete and len(sizes) > 1):
            raise FrameError(
                "all sites need the same number of outcomes and levels",
                got=" and ".join(f"{k} outcomes on {d} levels" for k, d in sorted(sizes)),
            )
        if len(sizes) > 1:
            most = max(k for k, _ in sizes)
            self.frames = tuple(_padded(frame, most) for frame in self.frames)
        self.num_outcomes, self.dim = self.frames[0].num_outcomes, self.frames[0].dim
        self.name = "SiteFrames"

    @property
    def num_sites(self) -> int:
        """How many sites."""
        return len(self.frames)

    def __repr__(self) -> str:
        return f"SiteFrames({', '.join(frame.name for frame in self.frames)})"

    def at(self, site: int) -> Any:
        """Return the frame of a site."""
        return self.frames[site]

    def probabilities(self, state: Any) -> Tensor:
        """Return outcome probabilities ``(N, K)`` of a product state: one state, or a list with one for each site."""
        return torch.stack([f.probabilities(s) for f, s in zip(self.frames, self._each(state), strict=True)])

    def positive_probabilities(self, state: Any) -> Tensor:
        """Return :meth:`probabilities`, all of them above zero.

        Raises:
            ZeroProbabilityError: If an outcome never happens.
        """
        return torch.stack(
            [f.positive_probabilities(s) for f, s in zip(self.frames, self._each(state), strict=True)]
        )

    def _each(self, state: Any) -> list[Any]:
        return site_states(state, self.num_sites)


def _padded(frame: Measurement, num_outcomes: int) -> Measurement:
    missing = num_outcomes - frame.num_outcomes
    if not missing:
        return frame
    nothing = torch.zeros(missing, frame.dim, frame.dim, dtype=frame.effects.dtype)
    return Measurement(torch.cat([frame.effects, nothing]), name=frame.name)
