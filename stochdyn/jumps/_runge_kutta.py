"""The classical Runge-Kutta step, for the equations of means and covariances of reaction networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["runge_kutta"]

State = tuple[Tensor, ...]


def runge_kutta(flow: Callable[..., State], state: State, h: float) -> State:
    """Return the state after a step of length ``h``, to fourth order.

    Args:
        flow: The function that maps the tensors of a state to their rates of change.
        state: The tensors of the state.
        h: The length of the step.
    """

    def moved(by: float, rates: State) -> State:
        return tuple(x + by * k for x, k in zip(state, rates, strict=True))

    k1 = flow(*state)
    k2 = flow(*moved(0.5 * h, k1))
    k3 = flow(*moved(0.5 * h, k2))
    k4 = flow(*moved(h, k3))
    return tuple(
        x + h / 6 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
    )
