"""Panels of states: subjects seen at their own irregular times, as transitions between consecutive visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.core.data.frames import as_frame, is_missing, read_column
from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.infer.panel import Panel

__all__ = ["Gaps", "PanelData"]

#: The column of codes of states.
_STATE = "state code"


@dataclass(frozen=True)
class Gaps:
    """All transitions between consecutive visits.

    Attributes:
        before: The states before, ``(n,)``.
        after: The states after, ``(n,)``.
        dt: The times between, ``(n,)``.
        entered: Whether the state after was entered at the very time of the visit, ``(n,)``.
        covariates: The values at the visit before, ``(n, c)``.
    """

    before: Tensor
    after: Tensor
    dt: Tensor
    entered: Tensor
    covariates: Tensor


class PanelData:
    """Subjects whose state is seen at visits: a :class:`stochdyn.Panel` of states.

    Args:
        frame: A data frame (pandas, polars, xarray, or a mapping of columns) with one row per visit.
        subject: The column that names subjects.
        time: The column of times, numbers or dates, in any order.
        state: The column of states. Their sorted values are the states 0, 1, 2, ... of all answers, see ``labels``. A row in which it
            is missing is left out: nothing was seen then.
        exact_entry: The labels of states whose time of entry is seen exactly, such as death.
        covariates: The columns that rates may depend on; values at the visit before a gap count.
        labels: The labels of all states in order, also of those that never occur; those that occur, sorted, if None.
        unit: The unit in which dates count, as in :class:`stochdyn.Panel`; numbers are taken as they are.

    Attributes:
        panel: The visits as a panel, with codes of states as values.
        labels: The S labels of the states in order.
        num_subjects: The number of subjects.
        gaps: All transitions between consecutive visits.

    Raises:
        InvalidInputError: If a column is missing, or a state of exact entry was left again.
        TimeGridError: If a time occurs twice within a subject, who is named.

    Example:
        >>> data = {"id": [1, 1, 1, 2, 2], "t": [0.0, 1.0, 2.5, 0.0, 2.0], "s": ["well", "ill", "ill", "well", "well"]}
        >>> panel = PanelData(data, subject="id", time="t", state="s")
        >>> panel.labels, panel.counts().tolist()
        (['ill', 'well'], [[1.0, 0.0], [1.0, 1.0]])
    """

    def __init__(
        self,
        frame: Any,
        subject: str,
        time: str,
        state: str,
        exact_entry: Sequence[Any] = (),
        covariates: Sequence[str] = (),
        labels: Sequence[Any] | None = None,
        *,
        unit: str = "day",
    ) -> None:
        frame = as_frame(frame)
        seen = read_column(frame, state, "state").tolist()
        if not seen:
            raise EmptyDataError("the panel has no rows")
        # a visit at which nothing was seen says nothing
        kept = np.array([not is_missing(label) for label in seen])
        seen = [label for label, there in zip(seen, kept, strict=True) if there]
        if not seen:
            raise EmptyDataError("every state of the panel is missing")
        self.labels: list[Any] = sorted(set(seen)) if labels is None else list(labels)
        if len(set(self.labels)) < len(self.labels):
            raise InvalidInputError("labels must differ", got=self.labels)
        if len(self.labels) < 2:
            raise InvalidInputError("the panel knows a single state only", got=self.labels)
        code = {label: k for k, label in enumerate(self.labels)}
        strangers = sorted(set(seen) - set(self.labels))
        if strangers:
            raise InvalidInputError(
                "state holds values that labels don't name", got=strangers, expected=self.labels
            )
        unknown = [label for label in exact_entry if label not in code]
        if unknown:
            raise InvalidInputError(
                "exact_entry names states that never occur", got=unknown, expected=self.labels
            )
        self.exact_entry = [code[label] for label in exact_entry]
        columns = {name: _rows(read_column(frame, name, "covariates"), kept) for name in covariates}
        coded = {
            subject: _rows(read_column(frame, subject, "subject"), kept),
            time: _rows(read_column(frame, time, "time"), kept),
            **columns,
            _STATE: np.array([code[label] for label in seen], dtype=float),
        }
        self.panel = Panel(coded, subject, time, _STATE, list(columns), unit=unit, dtype=torch.float64)
        self.covariate_names, self.num_subjects = list(columns), len(self.panel)
        self.gaps = self._gaps()

    def _gaps(self) -> Gaps:
        """Read the transitions off the panel."""
        states, times = self.rows()
        x = self.panel.covariates
        if bool(torch.isnan(x[states >= 0]).any()):
            bad = int(torch.isnan(x[states >= 0]).any(0).nonzero()[0, 0])
            raise InvalidInputError(f"the covariate {self.covariate_names[bad]!r} must not be missing")
        final = torch.zeros(self.num_states, dtype=torch.bool)
        final[self.exact_entry] = True
        before, after = states[:, :-1], states[:, 1:]
        real = after >= 0
        stuck = (real & final[before] & (after != before)).nonzero()
        if len(stuck):
            row, k = stuck[0].tolist()
            raise InvalidInputError(
                "a state of exact entry was left again",
                got=f"subject {self.panel.series[row]!r} from {self.labels[int(before[row, k])]!r} "
                f"to {self.labels[int(after[row, k])]!r}",
            )
        # nothing is learnt from staying where one can't leave
        keep = real & ~final[before]
        self._visits = keep.nonzero()
        if not bool(keep.any()):
            raise EmptyDataError("no subject was seen twice")
        dt = times[:, 1:] - times[:, :-1]
        entered = final[after.clamp(min=0)] & (before != after)
        return Gaps(before[keep], after[keep], _merged(dt[keep]), entered[keep], x[:, :-1][keep])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the states ``(N, T)`` of all subjects as codes, -1 past their last visit, and the times ``(N, T)``."""
        codes = self.panel.values[..., 0]
        states = torch.where(torch.isnan(codes), torch.full_like(codes, -1.0), codes).long()
        return states, self.panel.times

    def visits_of(self, gap: int) -> tuple[Any, float, float]:
        """Return the subject of a gap, and the times of the visits before and after it.

        Args:
            gap: The number of the gap in ``gaps``.
        """
        row, k = self._visits[gap].tolist()
        return self.panel.series[row], float(self.panel.times[row, k]), float(self.panel.times[row, k + 1])

    @property
    def num_states(self) -> int:
        """S, the number of states."""
        return len(self.labels)

    def counts(self) -> Tensor:
        """Return how many gaps lead from each state to each other, ``(S, S)``, whatever their lengths."""
        out = torch.zeros(self.num_states**2, dtype=torch.float64)
        flat = self.gaps.before * self.num_states + self.gaps.after
        out = out.index_add(0, flat, torch.ones_like(self.gaps.dt))
        return out.reshape(self.num_states, self.num_states)

    def crude_rates(self) -> Tensor:
        """Return observed jumps over observed time in each state, ``(S, S)``: a start for estimates, and biased."""
        time = torch.zeros(self.num_states, dtype=torch.float64).index_add(0, self.gaps.before, self.gaps.dt)
        counts = self.counts()
        counts.fill_diagonal_(0.0)
        return counts / time.clamp(min=1e-300)[:, None]


def _merged(dt: Tensor) -> Tensor:
    """Return times between visits with those made equal that differ by rounding, so that equal gaps are computed once.

    Differences of times on a regular grid differ by their last digits; they are known to no more than 1e-12 of their size.
    """
    values, place = dt.unique(return_inverse=True)
    close = values[1:] <= values[:-1] * (1 + 1e-12)
    if not bool(close.any()):
        return dt
    # runs of close neighbours, cut where they would be wider than the tolerance
    known, begin = values.tolist(), 0
    while begin < len(known):
        end = begin + 1
        while end < len(known) and known[end] <= known[begin] * (1 + 1e-12):
            end += 1
        values[begin:end] = known[(begin + end - 1) // 2]
        begin = end
    return values[place]


def _rows(column: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the rows of a column that are kept; one of another length stays, for the panel to refuse."""
    return column[kept] if len(column) == len(kept) else column
