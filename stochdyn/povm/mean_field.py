"""Mean field: the evolution in which every site stays independent of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_positive
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import InvalidInputError
from stochdyn.povm.frames.frame import Frame, QutritSIC, Tetrahedral
from stochdyn.povm.frames.lattice_observables import Observable
from stochdyn.povm.frames.operators import as_state
from stochdyn.povm.frames.products import site_states
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.arguments import as_times, check_frame, check_model, read_observables
from stochdyn.povm.master.density import check_bound
from stochdyn.povm.master.integration import integrate
from stochdyn.povm.master.propagation import check_length
from stochdyn.povm.master.schedule import Schedule, make_schedule

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["MeanFieldEvolution", "evolve", "marginal_rates"]


@dataclass(frozen=True)
class MeanFieldEvolution:
    """An evolution of independent sites.

    Attributes:
        times: The output times ``(T,)``.
        expect: The mean ``(T,)`` of every observable by name.
        stderr: Zeros ``(T,)`` for every observable: there is no sampling, and the error of the closure isn't known.
        probabilities: The outcome probabilities ``(T, N, K)`` of every site.
    """

    times: Tensor
    expect: dict[str, Tensor]
    stderr: dict[str, Tensor]
    probabilities: Tensor


def marginal_rates(operator: SparseMasterEquation, p: Tensor, t: float | None = None) -> Tensor:
    r"""Return the rates of change of every site's outcome probabilities, all sites being independent.

    .. math:: \dot p_i(a_i) = \sum_{S\ni i}\ \sum_{a_{S\setminus i}}\sum_{b_S}A^{(S)}_{a_Sb_S}\prod_{j\in S}p_j(b_j)

    For independent sites these are the exact rates of the one-site marginals.

    Args:
        operator: The master equation of a Lindbladian.
        p: The outcome probabilities ``(N, K)`` of every site.
        t: The time, where the operator depends on it.

    Returns:
        ``(N, K)``, each row summing to zero.
    """
    q = operator.num_outcomes
    factors = operator._factors(t)
    total = torch.zeros_like(p)
    for i, sites in enumerate(operator.sites):
        # the joint law of the sites of a term is the product of theirs; summed over the others, its flux is
        # that of one site
        joint = p[sites[0]]
        for site in sites[1:]:
            joint = (joint[:, None] * p[site]).reshape(-1)
        flux = operator.matrix(i).to(p.dtype) @ joint
        if factors is not None:
            flux = flux * factors[i]
        flux = flux.reshape((q,) * len(sites))
        for axis, site in enumerate(sites):
            rest = [k for k in range(len(sites)) if k != axis]
            total[site] += flux.sum(rest) if rest else flux
    return total


def evolve(
    model: Lindbladian,
    state: Any,
    ts: Tensor | Sequence[float],
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    povm: Frame | SiteFrames | None = None,
    rtol: float = 1e-9,
    atol: float = 1e-11,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
) -> MeanFieldEvolution:
    """Evolve a product state by mean-field theory: nonlinear equations for single sites, any number of them.

    When would I use this? As a baseline: what it misses is what correlations do. Without couplings it is exact.

    Args:
        model: The Lindbladian, its parameters bound.
        state: The initial state: the name or the state of one site, taken for all, or a list with one for each site.
        ts: The output times, increasing, the first being that of the initial state.
        observables: The observables, each as :func:`~stochdyn.povm.frames.lattice_observables.observable` takes it; a
            name on two sites is averaged over the bonds of the model.
        povm: The frame in which probabilities are kept, of no influence on the means.
        rtol: The relative tolerance of a step.
        atol: The absolute tolerance of a step.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.

    Raises:
        TimeGridError: If times don't increase.
        LindbladianError: If a rate is negative at some time, or parameters aren't bound.
        InvalidInputError: If the state is no product, or there is no frame for sites of so many levels.

    Example:
        >>> from stochdyn.povm import systems
        >>> run = evolve(systems.ising(64), "up", [0.0, 1.0], ["Z"])
        >>> run.probabilities.shape, run.expect["Z"].shape
        (torch.Size([2, 64, 4]), torch.Size([2]))
    """
    check_model(model)
    if povm is not None:
        check_frame(povm)
    grid = as_times(ts)
    check_positive(rtol, "rtol")
    check_positive(atol, "atol")
    check_bound(model)
    parsed = read_observables(model, observables)
    schedule = make_schedule(model, grid, max_step=max_step, breaks=breaks)
    if not model.is_time_dependent:
        check_length(model, schedule.span)
    if povm is None:
        if model.dim not in (2, 3):
            raise InvalidInputError(
                "there is no standard frame for these sites", got=f"{model.dim} levels", hint="pass povm"
            )
        povm = Tetrahedral() if model.dim == 2 else QutritSIC()
    n = model.num_sites
    states = site_states(state, n)
    for s in states:
        if as_state(s, model.dim).shape[0] != model.dim:
            raise InvalidInputError("mean field starts from a product of single sites")
    start = torch.stack([povm.at(i).probabilities(s) for i, s in enumerate(states)])
    operator = model.master_operator(povm)
    p = _integrate(operator, start, schedule, rtol, atol)
    rho = torch.stack(
        [torch.einsum("tk,kij->tij", p[:, i].to(torch.complex128), povm.at(i).dual) for i in range(n)], 1
    )
    expect = {name: product_expectation(o, rho) for name, o in parsed.items()}
    return MeanFieldEvolution(grid, expect, {k: torch.zeros_like(v) for k, v in expect.items()}, p)


def product_expectation(observable: Observable, rho: Tensor) -> Tensor:
    """Return the mean ``(T,)`` of an observable in product states, given single sites ``(T, N, d, d)``."""
    total = torch.zeros(rho.shape[0], dtype=torch.complex128)
    for term in observable.terms:
        widths = term.widths(observable.dim)
        for place, weight in zip(term.places, term.weights, strict=True):
            value = torch.full((rho.shape[0],), complex(weight), dtype=torch.complex128)
            first = 0
            for factor, width in zip(term.factors, widths, strict=True):
                # Tr(rho_1 x ... x rho_k O), factor by factor
                joint = rho[:, place[first]]
                for site in place[first + 1 : first + width]:
                    size = joint.shape[-1] * observable.dim
                    joint = torch.einsum("tij,tkl->tikjl", joint, rho[:, site]).reshape(-1, size, size)
                value = value * torch.einsum("tij,ji->t", joint, factor)
                first += width
            total += value
    return total.real if observable.is_hermitian else total


def _integrate(
    operator: SparseMasterEquation, start: Tensor, schedule: Schedule, rtol: float, atol: float
) -> Tensor:
    shape = tuple(start.shape)

    def change(t: float, y: np.ndarray) -> np.ndarray:
        return marginal_rates(operator, torch.from_numpy(y.reshape(shape)), t).detach().numpy().reshape(-1)

    found: list[Tensor] = []

    def look(_: int, y: np.ndarray) -> None:
        found.append(torch.from_numpy(y.copy()).reshape(shape))

    integrate(change, start.numpy().reshape(-1), schedule, look, rtol=rtol, atol=atol)
    return torch.stack(found)
