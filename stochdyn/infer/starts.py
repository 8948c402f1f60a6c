r"""Random starts of paths: what is random about the first state, its Gaussian posterior, and the sites that carry it.

What is random at the start is a vector :math:`s\in\mathbb R^S`: the first point of the path, or the standard normal
variables behind the past of its noise, or both. The first full state follows as :math:`z_0=\mathtt{base}+F^\top s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from stochdyn.core.girsanov import explicit_stop
from stochdyn.core.initial import DistributionStart
from stochdyn.errors import InvalidInputError
from stochdyn.infer.distributions import start_of

__all__ = ["StartPosterior", "StartPrior", "StartSite", "is_unconstrained"]


def is_unconstrained(law: Any) -> bool:
    """Return whether a distribution lives on all vectors, as a Gaussian posterior does."""
    support: Any = law.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


@dataclass(frozen=True)
class StartPrior:
    """The prior of a random start, by its moments.

    Attributes:
        mean: ``(*batch, S)``.
        covariance: ``(*batch, S, S)``.
        base: ``(*batch, Z)`` part of the first full state that isn't random.
        factor: ``F (S, Z)``.
        parts: event shapes of the sites that make up ``s``, by their names, in order.
    """

    mean: Tensor
    covariance: Tensor
    base: Tensor
    factor: Tensor
    parts: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of_point(name: str, law: torch.distributions.Distribution) -> StartPrior:
        """Describe the start of a path in state space, whose first point has the given law.

        Raises:
            InvalidInputError: if the law doesn't live on all vectors.
        """
        if not is_unconstrained(law):
            raise InvalidInputError(
                "a path in state space needs a start that lives on all vectors",
                got=f"support {law.support} at site {name!r}",
                hint="put the path in noise space: sample_path(..., noise_space=True), or NoiseReparam",
            )
        mean, covariance = _moments(law)
        dim = mean.shape[-1]
        base = torch.zeros_like(mean)
        return StartPrior(mean, covariance, base, torch.eye(dim).to(mean), {name: (dim,)})

    @staticmethod
    def of_sites(laws: Mapping[str, Any], x0: Tensor, past_factor: Tensor | None) -> StartPrior:
        """Describe the start of a path in noise space.

        Args:
            laws: the model's distributions of the start's sites: of the first point (event ``(d,)``), of the
                noise's past (event ``(m, Q)``), or of both in this order.
            x0: ``(*batch, d)`` first point, where it isn't random.
            past_factor: ``(Q, K)`` where the noise's past is among the sites, see
                :class:`stochdyn.core.noise.NoiseProcess`; None else.
        """
        dim = x0.shape[-1]
        parts = {name: tuple(law.event_shape) for name, law in laws.items()}
        base = x0.detach()
        means, covariances, rows = [], [], []
        for law in laws.values():
            if len(law.event_shape) == 1:
                mean, covariance = _moments(law)
                row = torch.eye(dim).to(x0)
                base = torch.zeros_like(base)
            else:
                mean = law.mean.detach().flatten(-2)
                covariance = torch.diag_embed(torch.ones_like(mean))
                row = torch.block_diag(*[past_factor] * law.event_shape[0])
            means.append(mean)
            covariances.append(covariance)
            rows.append(row)
        batch = torch.broadcast_shapes(base.shape[:-1], *(m.shape[:-1] for m in means))
        if past_factor is None:
            factor = torch.cat(rows)
            base = base.expand(*batch, dim)
        else:
            memory = rows[-1].shape[-1]
            factor = torch.nn.functional.pad(rows[-1], (dim, 0))
            if len(rows) == 2:
                factor = torch.cat([torch.nn.functional.pad(rows[0], (0, memory)), factor])
            base = torch.cat([base.expand(*batch, dim), x0.new_zeros(*batch, memory)], -1)
        mean = torch.cat([m.expand(*batch, m.shape[-1]) for m in means], -1)
        covariance = _block_diagonal([c.expand(*batch, *c.shape[-2:]) for c in covariances])
        return StartPrior(mean, covariance, base, factor, parts)

    def state(self, s: Tensor) -> Tensor:
        """Return the first full state ``(*batch, Z)``."""
        return self.base + s @ self.factor

    def update(self, precision: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Combine with the likelihood ``exp(-1/2 z P z + h z)`` of the first full state, in float64.

        Args:
            precision: ``P (*batch, Z', Z')``; Z' may exceed Z by states that always start at zero.
            linear: ``h (*batch, Z')``.

        Returns:
            Posterior mean ``(*batch, S)`` and Cholesky factor ``(*batch, S, S)``.
        """
        size = self.factor.shape[-1]
        f = self.factor.double()
        p, h = precision.double()[..., :size, :size], linear.double()[..., :size]
        prior = torch.linalg.inv(self.covariance.double())
        total = prior + f @ p @ f.mT
        pull = _times(prior, self.mean.double()) + (h - _times(p, self.base.double())) @ f.mT
        chol = torch.linalg.cholesky(0.5 * (total + total.mT))
        mean = torch.cholesky_solve(pull.unsqueeze(-1), chol).squeeze(-1)
        return mean, torch.linalg.cholesky(torch.cholesky_inverse(chol))


class StartPosterior:
    """A Gaussian posterior of a random start.

    Args:
        loc: ``(*batch, S)``.
        scale_tril: ``(*batch, S, S)``.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc = loc
        self.scale_tril = scale_tril

    def draw(self, sample_shape: torch.Size, batch_shape: torch.Size) -> Tensor:
        """Return ``(*sample, *batch, S)``."""
        standard = torch.randn(
            *sample_shape, *batch_shape, self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device
        )
        return self.loc + _times(self.scale_tril, standard)

    def log_prob(self, s: Tensor) -> Tensor:
        """Return the log density of ``s (..., S)``."""
        return torch.distributions.MultivariateNormal(
            self.loc, scale_tril=self.scale_tril, validate_args=False
        ).log_prob(s)

    def given(self, earlier: Tensor, stop: int) -> StartPosterior:
        """Return the law of the components from those of ``earlier (..., begin)`` up to ``stop``, given the earlier."""
        begin = earlier.shape[-1]
        loc, tril = self.loc[..., begin:stop], self.scale_tril[..., begin:stop, begin:stop]
        if begin:
            known = self.scale_tril[..., :begin, :begin]
            excess = (earlier - self.loc[..., :begin]).unsqueeze(-1)
            known = known.expand(*excess.shape[:-2], begin, begin)
            white = torch.linalg.solve_triangular(known, excess, upper=False).squeeze(-1)
            loc = loc + _times(self.scale_tril[..., begin:stop, :begin], white)
        return StartPosterior(loc, tril)


class StartSite(TorchDistribution):
    """One site of a random start, given the sites before it: some components of a :class:`StartPosterior`.

    Args:
        posterior: the joint law.
        earlier: ``(*batch, begin)`` components already sampled; ``begin`` may be 0.
        event_shape: shape of the site's event.
        estimator: ``"stl"`` stops the gradient of the explicit parameters in the score.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = True
    _carried = ("posterior", "earlier", "estimator", "stop")

    def __init__(
        self, posterior: StartPosterior, earlier: Tensor, event_shape: tuple[int, ...], estimator: str
    ) -> None:
        self.posterior, self.earlier, self.estimator = posterior, earlier, estimator
        self.stop = earlier.shape[-1] + torch.Size(event_shape).numel()
        batch = torch.broadcast_shapes(posterior.loc.shape[:-1], earlier.shape[:-1])
        super().__init__(batch, torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """All vectors."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> StartSite:
        """Return a batch of independent copies."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self._carried:
            setattr(new, name, getattr(self, name))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw, differentiably."""
        law = self.posterior.given(self.earlier, self.stop)
        flat = law.draw(torch.Size(sample_shape), self.batch_shape)
        return flat.reshape(*flat.shape[:-1], *self.event_shape)

    def _log_q(self, value: Tensor, earlier: Tensor) -> Tensor:
        flat = value.reshape(*value.shape[: value.ndim - len(self.event_shape)], -1)
        return self.posterior.given(earlier, self.stop).log_prob(flat)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density."""
        return self._log_q(value, self.earlier)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Report the exact density, differentiate the estimator."""
        log_q = self.log_prob(x)
        if self.estimator != "stl":
            return ScoreParts(log_q, 0, log_q)  # type: ignore[arg-type]
        flat = x.reshape(*log_q.shape, -1)
        earlier = self.earlier.expand(*log_q.shape, self.earlier.shape[-1])
        term = explicit_stop(lambda inputs: self._log_q(inputs[0].reshape(x.shape), inputs[1]), (flat, earlier))
        return ScoreParts(log_q, 0, term)  # type: ignore[arg-type]


def _moments(law: Any) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of a vector law; where they don't exist, a point of the law and the identity."""
    mean = start_of(DistributionStart(law))
    if hasattr(law, "covariance_matrix"):
        return mean, law.covariance_matrix.detach()
    try:
        variance = law.variance.detach()
    except NotImplementedError:
        variance = torch.full_like(mean, torch.nan)
    good = torch.isfinite(variance) & (variance > 0)
    return mean, torch.diag_embed(torch.where(good, variance, torch.ones_like(mean)))


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    sizes = [b.shape[-1] for b in blocks]
    out = blocks[0].new_zeros(*blocks[0].shape[:-2], sum(sizes), sum(sizes))
    top = 0
    for block, size in zip(blocks, sizes, strict=True):
        out[..., top : top + size, top : top + size] = block
        top += size
    return out


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
