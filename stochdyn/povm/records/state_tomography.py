"""Tomography with physical states: maximum likelihood with a certificate, and the posterior."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from stochdyn._checks import as_seed, check_bool, check_choice, check_nonempty, check_positive_int, check_real
from stochdyn._transforms import recorded, recording
from stochdyn.core.forward.outcomes import encode
from stochdyn.diagnostics.draws import seeded
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm.frames.frame import Measurement
from stochdyn.povm.frames.products import probabilities_of
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.arguments import check_measurement
from stochdyn.povm.records.goodness import GoodnessOfFit, goodness_of_fit, warn_of_chains, warn_of_fit
from stochdyn.povm.records.measurement import MeasurementRecords, check_unused

__all__ = ["Tomography", "tomography"]

_MAX_LEVELS, _MAX_OUTCOMES = 64, 1 << 16
_ROUNDS = 40


@dataclass(frozen=True)
class Tomography:
    r"""A state found from measurements, positive and of trace one.

    Attributes:
        state: The density matrix ``(D, D)``: the most likely one, or the mean of the posterior.
        log_likelihood: The log likelihood of the records at that state.
        gap: The bound on how much the log likelihood of any state is larger, by maximum likelihood; NaN for a
            posterior.
        goodness: The agreement of the records with the state.
        draws: The density matrices ``(num_draws, D, D)`` drawn from the posterior; None by maximum likelihood.
    """

    state: Tensor
    log_likelihood: float
    gap: float
    goodness: GoodnessOfFit
    draws: Tensor | None = field(default=None, repr=False)

    def expectation(self, operator: Any) -> tuple[float, float]:
        """Return the mean of an operator ``(D, D)`` in the state, and its posterior standard deviation (NaN without draws)."""
        from stochdyn.povm.frames.operators import as_matrix

        matrix = as_matrix(operator, "operator")
        if matrix.shape != self.state.shape:
            raise ShapeError(
                "operator and state differ in size", got=tuple(matrix.shape), expected=tuple(self.state.shape)
            )
        mean = float(torch.einsum("ij,ji->", self.state, matrix).real)
        if self.draws is None:
            return mean, math.nan
        return mean, float(torch.einsum("nij,ji->n", self.draws, matrix).real.std())


def tomography(
    records: MeasurementRecords | Any,
    povm: Measurement | SiteFrames,
    *,
    method: str = "likelihood",
    tolerance: float | None = None,
    num_draws: int | None = None,
    warmup: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tomography:
    r"""Return the state that measurement records come from, as a positive matrix of trace one.

    By maximum likelihood,

    .. math:: \hat\rho=\arg\max_{\rho\ge0,\,\operatorname{Tr}\rho=1}\sum_r\log\operatorname{Tr}\rho M_{a_r},

    a concave problem whose optimum is certified: with :math:`R=\sum_rM_{a_r}/\operatorname{Tr}\hat\rho M_{a_r}` no state
    is more likely by over :math:`\lambda_{\max}(R)-n`. Or as the posterior of states that are uniform in the
    Hilbert-Schmidt measure, :math:`\rho=AA^\dagger/\operatorname{Tr}AA^\dagger` with Gaussian ``A``, drawn by NUTS. When
    would I use this? The first for a best state of up to six qubits, the second for error bars of any function of it, of
    up to two or three. Known readout errors belong into the measurement
    (:meth:`~stochdyn.povm.Measurement.with_readout_errors`).

    Args:
        records: The measurement records, all at one time and from one preparation; or outcomes ``(n, N)``.
        povm: The measurement of all sites, or one for each site. It need not be complete, but then many states are as
            likely.
        method: The method, ``"likelihood"`` or ``"posterior"``.
        tolerance: The largest gap of the log likelihood, with ``"likelihood"``; 0.01 if None.
        num_draws: The number of draws, with ``"posterior"``; 500 if None.
        warmup: The number of steps before them, with ``"posterior"``; 300 if None.
        seed: The seed of the draws and of the test of fit.
        progress: Whether to show a progress bar.

    Returns:
        The state, its quality, and draws.

    Raises:
        SystemSizeError: If there are over 64 levels (six qubits), or over 65536 outcomes.
        InvalidInputError: If records are of several times or preparations, or an option doesn't belong to the method.

    Warns:
        ConvergenceWarning: If the gap stays above the tolerance, the chain hasn't mixed (R-hat), or the records don't
            look as any state says.

    Example:
        >>> from stochdyn.povm import Lindbladian, Pauli6, simulate_records
        >>> records = simulate_records(Lindbladian(1, [(1.0, "X", 0)]), Pauli6(), "up", [0.0], 2000, generator=0)
        >>> found = tomography(records, Pauli6(), progress=False)
        >>> bool(found.state[0, 0].real > 0.95), bool(torch.linalg.eigvalsh(found.state)[0] >= -1e-12)
        (True, True)

    Reference:
        Hradil, Phys. Rev. A 55, R1561 (1997); Blume-Kohout, New J. Phys. 12, 043034 (2010).
    """
    check_measurement(povm)
    check_choice(method, ("likelihood", "posterior"), "method")
    sampled = {"num_draws": num_draws, "warmup": warmup}
    check_unused(method, {"tolerance": tolerance} if method == "posterior" else sampled)
    tolerance = 1e-2 if tolerance is None else tolerance
    num_draws, warmup = 500 if num_draws is None else num_draws, 300 if warmup is None else warmup
    check_real(tolerance, "tolerance", above=0.0)
    check_positive_int(num_draws, "num_draws", 2)
    check_positive_int(warmup, "warmup")
    check_bool(progress, "progress")
    seed = as_seed(seed)
    if not isinstance(records, MeasurementRecords):
        records = MeasurementRecords.of([0.0], [records], povm.num_outcomes)
    check_nonempty(records.outcomes, "records")
    if len(records.cell.unique()) > 1:
        raise InvalidInputError("tomography is of one state: records must be of one time and preparation")
    n, k = records.num_sites, povm.num_outcomes
    if records.num_outcomes != k or getattr(povm, "num_sites", n) != n:
        raise ShapeError("the records are of another measurement", got=records.num_outcomes, expected=k)
    if povm.dim**n > _MAX_LEVELS or k**n > _MAX_OUTCOMES:
        raise SystemSizeError(
            "the state is too large for tomography",
            got=f"{n} sites, {k**n} outcomes",
            expected=f"at most {_MAX_LEVELS} levels and {_MAX_OUTCOMES} outcomes",
        )
    frames = [povm.at(i) for i in range(n)]
    counts = torch.bincount(encode(records.outcomes, k), minlength=k**n).double()
    single = MeasurementRecords(
        torch.zeros(1, dtype=torch.float64), torch.zeros(len(records), dtype=torch.long), records.outcomes, k
    )
    draws, gap = None, math.nan
    if method == "likelihood":
        state, gap = _most_likely(counts, frames, povm.dim**n, tolerance)
    else:
        draws = _posterior(counts, frames, povm.dim**n, num_draws, warmup, seed, progress)
        state = draws.mean(0)
        drawn = torch.stack([_log_likelihood(counts, probabilities_of(rho, frames)) for rho in draws])
        warn_of_chains({"the log likelihood": drawn[None]})
    p = probabilities_of(state, frames)
    fit = goodness_of_fit(single, p[None], generator=seed)
    likelihood = float(_log_likelihood(counts, p))
    warn_of_fit(fit)
    if gap > tolerance:
        warnings.warn(
            f"the most likely state isn't reached: another may be more likely by {gap:.2g}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Tomography(state, likelihood, gap, fit, draws)


def _log_likelihood(counts: Tensor, p: Tensor) -> Tensor:
    """Return the log likelihood of counts, of which outcomes that never came are no part."""
    seen = counts > 0
    return (counts[seen] * p[seen].clamp(min=1e-300).log()).sum()


def _state_of(a: Tensor) -> Tensor:
    """Return the density matrix of a square root ``(2, D, D)``, its real and imaginary part."""
    # rho = A A^dagger / Tr A A^dagger is positive and of trace one for every A
    root = torch.complex(a[0], a[1])
    rho = root @ root.mH
    return rho / rho.diagonal().sum().real


@recorded
def _most_likely(
    counts: Tensor, frames: list[Measurement], size: int, tolerance: float
) -> tuple[Tensor, float]:
    """Maximise the likelihood over square roots, until the certificate says that no state is better."""
    a = torch.zeros(2, size, size, dtype=torch.float64)
    a[0] = torch.eye(size, dtype=torch.float64)
    a.requires_grad_(True)
    total = float(counts.sum())

    def loss() -> Tensor:
        return -_log_likelihood(counts, probabilities_of(_state_of(a), frames)) / total

    def closure() -> Tensor:
        a.grad = None
        value = loss()
        value.backward()
        return value

    gap, state = math.inf, torch.eye(size, dtype=torch.complex128) / size
    optimiser = torch.optim.LBFGS(
        [a], lr=1.0, max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    for _ in range(_ROUNDS):
        optimiser.step(closure)
        with torch.no_grad():
            # of the same law, of trace one, so that the next round is as well scaled as the first
            a.mul_((size / a.square().sum()).sqrt())
        found = _state_of(a.detach())
        now = _gap(found, counts, frames)
        if now < gap:
            gap, state = now, found
        if gap <= tolerance:
            break
    return state, gap


@recorded
def _gap(rho: Tensor, counts: Tensor, frames: list[Measurement]) -> float:
    r"""Return :math:`\lambda_{\max}(R)-n`, by which no state is more likely."""
    variable = rho.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(_log_likelihood(counts, probabilities_of(variable, frames)), variable)
    # the log likelihood is concave, so log L(sigma) - log L(rho) <= Tr R (sigma - rho) <= lambda_max(R) - n
    r = (gradient + gradient.mH) / 2
    return float(torch.linalg.eigvalsh(r)[-1] - counts.sum())


def _posterior(
    counts: Tensor,
    frames: list[Measurement],
    size: int,
    num_draws: int,
    warmup: int,
    seed: int,
    progress: bool,
) -> Tensor:
    def program() -> None:
        normal = dist.Normal(torch.zeros(2, size, size, dtype=torch.float64), 1.0).to_event(3)
        p = probabilities_of(_state_of(pyro.sample("root", normal)), frames)
        pyro.factor("records", _log_likelihood(counts, p))

    with seeded(seed), pyro.get_param_store().scope():
        chain = MCMC(
            NUTS(program, max_tree_depth=6),
            num_samples=num_draws,
            warmup_steps=warmup,
            disable_progbar=not progress,
        )
        with recording():
            chain.run()
        roots = chain.get_samples()["root"]
    return torch.stack([_state_of(root) for root in roots])
