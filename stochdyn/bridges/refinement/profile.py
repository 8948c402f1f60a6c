"""The profile objective of a refinement as a Pyro model: parameters are sampled, paths integrated out by the bridge."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import as_seed, check_positive, check_positive_int, check_real
from stochdyn.bridges.data.snapshots import redrawn_weights
from stochdyn.bridges.refinement.identifiability import check_information
from stochdyn.bridges.refinement.linear_response import (
    LinearResponse,
    flatten,
    pair_moments,
    with_coordinates,
)
from stochdyn.bridges.refinement.uncertainty import COORDINATES
from stochdyn.errors import UnavailableError
from stochdyn.infer.naming import fresh_name
from stochdyn.run.interrupt import Interrupted
from stochdyn.run.randomness import fork_random_state
from stochdyn.run.trainer import fit as train

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = ["BridgeProfile", "ProfileFit", "fit_profile"]

_WIDE = 100.0


class BridgeProfile:
    r"""A Pyro model of the parameters :math:`\theta` of a reference, with the paths integrated out.

    .. math:: p(\theta\mid\pi)\propto p(\theta)\,e^{-\eta N F(\theta)},\qquad
        F(\theta)=\min_{q:\,q_{t_i}=\pi_i}\mathrm{KL}(q\,\|\,p_\theta)

    Paths are latent. Were one cohort of :math:`N` particles seen at all snapshots, its law of large deviations (Sanov) would be this with
    :math:`\eta=1`, and the evidence lower bound of a guide :math:`r(\theta)\,q_\theta(\mathrm{path})`, whose paths follow the bridge, is

    .. math:: E_r[\log p(\theta)-N F(\theta)]+H(r).

    With fresh particles at every snapshot, each adds noise of its own, and :math:`\eta<1`; :func:`fit_profile` finds it. The gradient
    is that of the divergence at a fixed bridge (envelope theorem):

    .. math:: \nabla F=-E_{q_\theta}\int(\partial_\theta b_\theta)^\top(GG^\top)^{-1}(u-b_\theta)\,dt .

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it.
        temper: The power :math:`\eta` of the likelihood, positive.
        population: The number :math:`N` of particles that the divergence counts for; the mean size of a snapshot if None.
        width: The standard deviations ``(P,)`` of the normal prior about the fit that stands for a flat one where the family
            has no prior of its own.
    """

    # A bridge per value of the parameters is remembered, and says nothing that the rest doesn't.
    _derived_ = ("_memo",)

    def __init__(
        self,
        fit: Refinement,
        temper: float = 1.0,
        population: float | None = None,
        width: Tensor | None = None,
    ) -> None:
        check_positive(temper, "temper")
        self.fit, self.family, self.bridge = fit, fit.family, fit.bridge
        if population is not None:
            check_real(population, "population", above=0.0)
        self.population = fit.snapshots.mean_count if population is None else float(population)
        self.temper = float(temper)
        self.centre = flatten(self.family)
        self.width = self._default_width() if width is None else width
        self.floor = float(self.bridge.objective)
        self._white = torch.linalg.inv(torch.linalg.cholesky(self.bridge.spread))
        self._memo: dict[bytes, tuple[Tensor, Tensor]] = {}

    def _default_width(self) -> Tensor:
        """A hundred standard errors, were paths seen, in the units of each parameter."""
        information = self.population * LinearResponse(self.fit, ignore_prior=True).complete
        return _WIDE * information.diagonal().rsqrt()

    def evaluate(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``F`` less its value at the fit, and its gradient ``(P,)``, at ``theta (P,)``."""
        key = theta.detach().double().cpu().numpy().tobytes()
        if key not in self._memo:
            moved = with_coordinates(self.family, theta.detach())
            old = self.bridge
            bridge = old.like(reference=moved).solve(old)
            gradient = torch.zeros_like(self.centre)
            for i, (part, plan) in enumerate(zip(bridge._transitions, bridge.plans, strict=True)):
                first, second, _, moments = pair_moments(bridge, i, part, plan, moved, self._white)
                # envelope theorem: the gradient at a fixed bridge, summed over pairs
                gradient -= (plan.plan() / plan.mass)[first, second].double() @ moments
            self._memo[key] = bridge.objective.double() - self.floor, gradient
        return self._memo[key]

    def log_prior(self, theta: Tensor) -> Tensor:
        """Return the family's own log prior density in these coordinates, differentiable, or zero."""
        from stochdyn.bridges.families.pyro_family import PyroDrift

        if not isinstance(self.family, PyroDrift):
            return theta.new_zeros(())
        moved, place, parts = self.family, 0, []
        values = {}
        for name in moved.sites:
            own = moved.unconstrained[name.replace(".", "__")]
            raw = theta[place : place + own.numel()].reshape(own.shape).to(own.dtype)
            place += own.numel()
            transform = moved._bijections[name]
            values[name] = transform(raw)
            log_det = transform.log_abs_det_jacobian(raw, values[name])
            parts.append(log_det.sum())
        return torch.stack(parts).sum() + moved.log_prior_of(values)

    def __call__(self) -> None:
        """Sample the parameters and score them."""
        import pyro
        import pyro.distributions as dist

        theta = pyro.sample(COORDINATES, dist.Normal(self.centre, self.width).to_event(1))
        rows = theta.reshape(-1, theta.shape[-1])
        scores = torch.stack([_Profile.apply(row, self) for row in rows])
        prior = torch.stack([self.log_prior(row).double() for row in rows])
        batch = theta.shape[:-1]
        pyro.factor("bridge", -self.temper * self.population * scores.reshape(batch))
        pyro.factor("prior", prior.reshape(batch))
        named = [with_coordinates(self.family, row.detach()).named_values() for row in rows]
        for name, first in named[0].items():
            stacked = torch.stack([values[name] for values in named])
            pyro.deterministic(name, stacked.reshape((*batch, *first.shape)), event_dim=first.ndim)


class _Profile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, profile: BridgeProfile) -> Tensor:
        value, gradient = profile.evaluate(theta)
        ctx.save_for_backward(theta, gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        theta, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # known by its values alone: a derivative of it would be taken for zero
            gradient = _Last.apply(gradient, theta)
        return slope * gradient, None


class _Last(torch.autograd.Function):
    """A gradient that has no derivatives."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, theta: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, None]:
        raise UnavailableError(
            "the profile of a bridge has first derivatives alone", hint="take differences of its gradients"
        )


class ProfileFit:
    """A fitted guide of a :class:`BridgeProfile`.

    Attributes:
        model: The model that the guide is of.
        guide: The guide, an ``AutoMultivariateNormal`` over the coordinates.
        losses: The negative evidence lower bound of every step, up to a constant.
        temper: The power of the likelihood.
    """

    def __init__(self, model: BridgeProfile, guide: Any, losses: list[float]) -> None:
        self.model, self.guide, self.losses, self.temper = model, guide, losses, model.temper

    def posterior(self, num_draws: int = 100, seed: int = 0) -> Any:
        """Draw from the guide by :func:`stochdyn.to_inference_data`."""
        from stochdyn.diagnostics.inference_data import to_inference_data

        idata = to_inference_data(self.model, self.guide, num_draws=num_draws, seed=seed)
        idata.attrs["temper"] = self.temper
        idata.attrs["guide"] = idata.attrs.get("estimator", "")
        idata.attrs["estimator"] = "svi"
        return idata


def fit_profile(
    fit: Refinement,
    steps: int = 30,
    lr: float = 0.02,
    num_particles: int = 2,
    seed: int = 0,
    temper: float | None = None,
    population: float | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> ProfileFit:
    r"""Fit a Gaussian guide to the posterior of a :class:`BridgeProfile` by Pyro's SVI.

    The guide starts at Laplace's approximation, from the linear response of the refinement. The likelihood's power is

    .. math:: \eta=P\,/\,\mathrm{tr}\big(N F''\,\Sigma\big),

    where :math:`\Sigma` is the bootstrap's covariance: the posterior then is as wide as estimates scatter, on average over directions
    in the metric of its own information.

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it, of a family with at most sixty parameters.
        steps: The number of steps of SVI; each costs ``num_particles`` bridges.
        lr: The learning rate of Adam, in standard deviations of the guide.
        num_particles: The number of draws per step.
        seed: The seed of all randomness.
        temper: The power :math:`\eta` of the likelihood; calibrated if None, 1 for one cohort that was seen at all snapshots.
        population: The number :math:`N` of particles that the divergence counts for; the mean size of a snapshot if None.
        progress: Whether to show a progress bar, after two seconds.
        checkpoint: The directory that is saved to after every step.
        resume: Whether to continue the run in ``checkpoint``.

    Raises:
        InvalidInputError: If there are more parameters.
        Interrupted: After Ctrl-C; its ``result`` is the guide so far.

    Reference: Lyddon, Holmes & Walker (2019), General Bayesian updating and the loss-likelihood bootstrap, Biometrika 106.
    """
    from pyro.infer import Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value

    check_positive_int(steps, "steps", 0)
    check_positive_int(num_particles, "num_particles")
    check_real(lr, "lr", above=0.0)
    seed = as_seed(seed)
    for name, value in (("temper", temper), ("population", population)):
        if value is not None:
            check_real(value, name, above=0.0)
    response = LinearResponse(fit, ignore_prior=True)
    check_information(response, stacklevel=4)
    count = fit.snapshots.mean_count if population is None else float(population)
    information = count * _positive(response.observed)
    if temper is None:
        generator = torch.Generator(fit.snapshots.device).manual_seed(seed)
        draws = response(redrawn_weights(fit.snapshots, 100, generator))
        # eta = P / tr(N F'' Sigma): as wide as estimates scatter, on average over directions
        temper = min(1.0, len(draws.mT) / float((information @ torch.cov(draws.mT)).diagonal().sum()))
    has_prior = fit.family.log_prior() is not None
    width = _WIDE * torch.linalg.inv(temper * information).diagonal().sqrt()
    model = BridgeProfile(fit, temper, population, _WIDE * width if has_prior else width)
    if has_prior:
        curvature = torch.autograd.functional.hessian(model.log_prior, flatten(fit.family))
        information = information - curvature.to(information) / temper
    spread = torch.linalg.cholesky(torch.linalg.inv(temper * _positive(information)))
    start = flatten(fit.family) if has_prior else response.converged
    guide = AutoMultivariateNormal(
        model, init_loc_fn=init_to_value(values={COORDINATES: start}), init_scale=0.1
    )
    guide._pyro_name = fresh_name("AutoMultivariateNormal")
    with fork_random_state(seed, fit.snapshots.device):
        guide()
    with torch.no_grad():
        diagonal = spread.diagonal()
        guide.scale = diagonal.clone()
        guide.scale_tril = spread / diagonal[:, None]
    if not steps:
        return ProfileFit(model, guide, [])
    bound: Any = Trace_ELBO(num_particles=num_particles)
    try:
        # The learning rate is in units of the guide's spread: a step moves locations by a part of a standard deviation.
        result = train(
            bound(model, guide), steps=steps, lr=lr * float(diagonal.mean()),
            seed=seed, progress=progress, checkpoint=checkpoint, resume=resume, checkpoint_every=1,
        )  # fmt: skip
    except Interrupted as stopped:
        so_far = ProfileFit(model, guide, stopped.result.losses.tolist())
        raise Interrupted(str(stopped), so_far) from None
    return ProfileFit(model, guide, result.losses.tolist())


def _positive(matrix: Tensor) -> Tensor:
    """Return the matrix with eigenvalues at least a millionth of the largest."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-6 * float(values[-1]))) @ vectors.mT
