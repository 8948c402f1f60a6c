"""Panels of states: subjects seen at their own irregular times, from a data frame or from lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_tensor
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError

__all__ = ["PanelData"]


@dataclass(frozen=True)
class Gaps:
    """All transitions between consecutive visits.

    Attributes:
        before: ``(n,)`` states before.
        after: ``(n,)`` states after.
        dt: ``(n,)`` times between.
        entered: ``(n,)`` whether the state after was entered at the very time of the visit.
        covariates: ``(n, c)`` values at the visit before.
    """

    before: Tensor
    after: Tensor
    dt: Tensor
    entered: Tensor
    covariates: Tensor


class PanelData:
    """Subjects whose state is seen at visits.

    Args:
        frame: a data frame (pandas, polars, or a mapping of columns) with one row per visit.
        subject: the column that names subjects.
        time: the column of times, which increase within each subject.
        state: the column of states. Their sorted values are the states 0, 1, 2, ... of all answers, see ``labels``.
        exact_entry: labels of states whose time of entry is seen exactly, such as death.
        covariates: columns that rates may depend on; values at the visit before a gap count.
        labels: The labels of all states in order, also of those that never occur; those that occur, sorted, if None.

    Attributes:
        labels: the S labels of the states in order.
        num_subjects: the number of subjects.

    Raises:
        InvalidInputError: for missing columns or states.
        TimeGridError: for times that don't increase within a subject, who is named.

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
    ) -> None:
        who = _column(frame, subject, "subject")
        at = as_tensor(_column(frame, time, "time"), "time", 1, "one value per row").double().numpy()
        seen = _column(frame, state, "state")
        if not len(who):
            raise EmptyDataError("the panel has no rows")
        if any(label is None or label != label for label in seen.tolist()):
            raise InvalidInputError(
                "state must not be missing", hint="leave out visits at which nothing was seen"
            )
        self.labels: list[Any] = sorted(set(seen.tolist())) if labels is None else list(labels)
        if len(set(self.labels)) < len(self.labels):
            raise InvalidInputError("labels must differ", got=self.labels)
        if len(self.labels) < 2:
            raise InvalidInputError("the panel knows a single state only", got=self.labels)
        code = {label: k for k, label in enumerate(self.labels)}
        strangers = sorted(set(seen.tolist()) - set(self.labels))
        if strangers:
            raise InvalidInputError("state holds values that labels don't name", got=strangers, expected=self.labels)
        unknown = [label for label in exact_entry if label not in code]
        if unknown:
            raise InvalidInputError(
                "exact_entry names states that never occur", got=unknown, expected=self.labels
            )
        self.exact_entry = [code[label] for label in exact_entry]
        self.covariate_names = list(covariates)
        values = [
            as_tensor(_column(frame, c, "covariates"), c, 1, "one value per row").double().numpy()
            for c in covariates
        ]
        x = np.stack(values, -1) if values else np.zeros((len(at), 0))
        states = np.array([code[label] for label in seen.tolist()])
        first: dict[Any, int] = {}
        index = np.array([first.setdefault(name, len(first)) for name in who.tolist()])
        self.num_subjects = len(first)
        order = np.argsort(index, kind="stable")
        index, at, states, x = index[order], at[order], states[order], x[order]
        same = index[1:] == index[:-1]
        bad = same & (np.diff(at) <= 0)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            name = list(first)[index[k]]
            raise TimeGridError(
                f"times must increase within subject {name!r}",
                got=f"{at[k + 1]:g} after {at[k]:g}",
                hint="sort the rows by subject and time, and merge repeated visits",
            )
        entered = np.isin(states[1:], self.exact_entry)
        before, after = states[:-1][same], states[1:][same]
        stuck = same & np.isin(states[:-1], self.exact_entry) & (states[1:] != states[:-1])
        if stuck.any():
            k = int(np.flatnonzero(stuck)[0])
            raise InvalidInputError(
                "a state of exact entry was left again",
                got=f"subject {list(first)[index[k]]!r} from {self.labels[states[k]]!r} to {self.labels[states[k + 1]]!r}",
            )
        stay = np.isin(before, self.exact_entry)
        keep = ~stay  # nothing is learnt from staying where one can't leave
        self.gaps = Gaps(
            torch.as_tensor(before[keep]),
            torch.as_tensor(after[keep]),
            torch.as_tensor(np.diff(at)[same][keep]),
            torch.as_tensor(entered[same][keep] & (before != after)[keep]),
            torch.as_tensor(x[:-1][same][keep]),
        )
        if not len(self.gaps.before):
            raise EmptyDataError("no subject was seen twice")

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


def _column(frame: Any, name: str, argument: str) -> np.ndarray:
    """Return a column of a data frame of any kind."""
    if not isinstance(name, str):
        raise InvalidInputError(f"{argument} must name a column", got=repr(name)[:60])
    try:
        column = frame[name]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{argument} isn't a column of the frame", got=repr(name)) from error
    except Exception as error:  # polars has errors of its own
        raise InvalidInputError(f"{argument} isn't a column of the frame", got=repr(name)) from error
    array = np.asarray(column)
    if array.ndim != 1:
        raise ShapeError(f"the column {name!r} must have one value per row", got=array.shape)
    return array
