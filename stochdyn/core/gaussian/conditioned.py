"""A Gaussian law on paths given observations, which is a law on paths itself."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, check_event_size
from stochdyn.core.forward.flow import as_time
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.density import Conditionals
from stochdyn.core.gaussian.law import GaussianPathMeasure, GaussianPathPosterior, pick, union_grid
from stochdyn.core.gaussian.observations import Observations
from stochdyn.core.gaussian.recursion import align
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import UnavailableError

__all__ = ["ConditionedMeasure"]


class ConditionedMeasure(GaussianPathMeasure):
    r"""A Gaussian law on paths given noisy or exact values of it at some times.

    It comes from :meth:`GaussianPathMeasure.conditioned`. Moments are those of a smoother that inverts no covariance of
    the state, and draws are prior paths corrected by their smoothed residual, so that exact observations (a pinned
    process) and singular noise do no harm.

    Use it as the posterior of a linear law: it can be sampled, asked for moments at any time, and compared with other
    laws.

    Args:
        prior: The law before the observations.
        seen: The observations.

    Attributes:
        log_evidence_of_data: The log density ``(*B,)`` of the observations under the prior.
    """

    def __init__(self, prior: GaussianPathMeasure, seen: Observations) -> None:
        super().__init__()
        self.prior = prior
        self.times: Tensor
        self._y: Tensor
        self._emission: Tensor
        self._obs_cov: Tensor
        self._mask: Tensor | None
        parts = {
            "times": seen.times,
            "_y": seen.y,
            "_emission": seen.emission,
            "_obs_cov": seen.obs_cov,
            "_mask": seen.mask,
        }
        for name, value in parts.items():
            self.register_buffer(
                name, value if value is None or value.requires_grad else value.detach().clone()
            )
        self.dim, self.series_grids = prior.dim, prior.series_grids
        self.batch_shape = torch.broadcast_shapes(
            prior.batch_shape, seen.y.shape[1:-1], seen.emission.shape[1:-2], seen.obs_cov.shape[1:-2]
        )

    @property
    def seen(self) -> Observations:
        """The observations, in the state of the chain."""
        return Observations(self.times, self._y, self._emission, self._obs_cov, self._mask)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the law."""
        return self.prior.like

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """Return :math:`H (d, z)` and :math:`h (*B, d)`, None for the identity and for zero."""
        return self.prior.read()

    def dtype_at(self, ts: Tensor) -> torch.dtype:
        """Return the precision of answers at times ``ts``."""
        return self.prior.dtype_at(ts)

    def chain(self, ts: Tensor) -> GaussianChain:
        """Raise: the answers come from a smoother, not from a chain of the conditioned law."""
        raise UnavailableError("a conditioned law is smoothed rather than run forward; its prior has a chain")

    def log_evidence_of_data(self) -> Tensor:
        """Return the ``(*B,)`` log density of the observations under the prior."""
        chain = self.prior.chain(self.times)
        return chain.log_evidence(**self.seen.on(self.times)).to(self.dtype_at(self.times))  # type: ignore[arg-type]

    def summary(self, ts: Tensor) -> GaussianPathPosterior:
        """Return the moments at times ``ts (T,)`` and the evidence, from one pass of the smoother."""
        ts = self._grid(ts)
        nodes, seen_at, where = union_grid(self.seen, ts)
        smoothed = self.prior.chain(nodes).smooth(**self.seen.on(nodes, seen_at))  # type: ignore[arg-type]
        states = pick(smoothed.mean, where, 1), pick(smoothed.cov, where, 2)
        mean, cov = self._read_moments(states, ts)
        evidence = smoothed.log_evidence.to(mean.dtype)
        return GaussianPathPosterior(ts, mean.movedim(0, -2), cov.movedim(0, -3), evidence, self)

    def _moments(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        summary = self.summary(ts)
        return summary.mean.movedim(-2, 0), summary.covariance.movedim(-3, 0)

    def joint_covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance ``(*B, T d, T d)`` of the path, flattened with time leading."""
        ts = self._grid(ts)
        nodes, seen_at, where = union_grid(self.seen, ts)
        read = self.read()[0]
        joint = self.prior.chain(nodes).posterior_joint_covariance(**self.seen.on(nodes, seen_at), read=read)  # type: ignore[arg-type]
        index = (where[..., None] * self.dim + torch.arange(self.dim, device=where.device)).flatten(-2)
        rows, columns = (index.unsqueeze(k).expand(*joint.shape[:-2], -1, -1) for k in (-1, -2))
        part = joint.gather(-2, rows.expand(*rows.shape[:-1], joint.shape[-1]))
        return part.gather(-1, columns.expand(*part.shape[:-1], index.shape[-1])).to(self.dtype_at(ts))

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths ``(*sample, *B, T, d)`` at times ``ts (T,)``, reparametrised; see :meth:`PathMeasure.sample`."""
        ts, shape = self._grid(ts), as_sample_shape(sample_shape)
        nodes, seen_at, where = union_grid(self.seen, ts)
        source = as_generator(generator, self.like.device)
        z = self.prior.chain(nodes).sample_posterior(shape, **self.seen.on(nodes, seen_at), generator=source)  # type: ignore[arg-type]
        z = pick(z.movedim(len(shape), 0), where, 1).movedim(0, len(shape))
        x = self._read_states(z, len(shape) + 1)
        return PathSample.of_states(ts, x.movedim(len(shape), -2).to(self.dtype_at(ts)), self)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return the drift :math:`b(t,x)+GG^\top\nabla\log p(y_{>t}\mid X_t=x)`, ``(..., d)`` at ``x (..., *B, d)``.

        Raises:
            UnavailableError: If the prior isn't a diffusion in its state alone.
        """
        check_event_size(x, self.dim, "x")
        if self.times.ndim > 1:
            self._refuse("drift", "its series have observations at times of their own")
        time = as_time(t, x)
        prior = self.prior.drift(time, x)
        if time.numel() == 1:
            return prior + self._pull(time.reshape(()), x)
        if time.ndim < 2:
            time = time.reshape(*(1,) * (x.ndim - time.ndim), *time.shape)
        clock = time.expand(*x.shape[:-1], 1)[..., 0]
        out = torch.zeros_like(prior)
        for one in time.unique():
            here = (clock == one).unsqueeze(-1)
            out = torch.where(here, self._pull(one, x), out)
        return prior + out

    def _pull(self, t: Tensor, x: Tensor) -> Tensor:
        """Return ``G G^T`` times the score of the later observations, given ``x (..., *B, d)`` at ``t``."""
        later = self.times.detach() > t.detach()
        if not bool(later.any()):
            return torch.zeros_like(x)
        spread = self.prior.covariance_rate(t.reshape(1))[0]
        seen = self.seen
        keep = later.nonzero()[:, 0]
        part = Observations(
            seen.times[keep],
            seen.y[keep],
            seen.emission if seen.emission.ndim == 2 else seen.emission[keep],
            seen.obs_cov if seen.obs_cov.ndim == 2 else seen.obs_cov[keep],
            None if seen.mask is None else seen.mask[keep],
        )
        nodes = torch.cat((t.to(part.times.dtype)[None], part.times))
        whole = self.prior.chain(nodes)
        fixed = GaussianChain(
            x, x.new_zeros(self.dim, self.dim), whole.transition, whole.offset, whole.noise_cov
        )
        data = part.on(nodes)
        mask = data["mask"]
        if mask is None:
            mask = torch.ones(nodes.shape[0], *(1,) * (part.y.ndim - 2), dtype=torch.bool, device=x.device)
            mask[0] = False
            data["mask"] = mask
        score = fixed.score_of_start(**data)  # type: ignore[arg-type]
        return (spread @ score.unsqueeze(-1)).squeeze(-1)

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` of a diffusion at times ``t (n,)``."""
        return self.prior.covariance_rate(t)

    def to_sde(self) -> SDE:
        """Return the equation of a diffusion, for simulation and control; exact observations make its drift infinite where they lie."""
        return SDE(self.drift, self.prior.to_sde().diffusion)

    def conditionals(self, path: Path, stop: bool = False) -> Conditionals:
        """Raise: the densities are ratios of evidences."""
        self._refuse("estimator of this name", "its densities are known for whole paths, estimator='density'")

    def _density(self, path: Path) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\log p(x,y)-\log p(y)`: the path is one more, exact observation beside the data."""
        nodes, seen_at, where = union_grid(self.seen, path.ts)
        if nodes.ndim > 1:
            self._refuse("density", "its series have times of their own")
        chain = self.prior.chain(nodes)
        read, offset = self.read()
        count, dim, size = nodes.shape[0], self.dim, chain.state_dim
        data = self.seen.on(nodes, seen_at)
        y, through, cov = (data[name] for name in ("y", "emission", "obs_cov"))
        assert y is not None and through is not None and cov is not None
        x = path.x.to(y.dtype)
        x = (x if offset is None else x - offset[..., None, :]).movedim(-2, 0)
        batch = torch.broadcast_shapes(x.shape[1:-1], y.shape[1:-1], self.batch_shape)
        width = y.shape[-1]

        # everything as (nodes, *batch, ...)
        def spread(value: Tensor, event: int, lead: bool = True) -> Tensor:
            value = value if lead else value.expand(count, *value.shape)
            return align(value, 1, event, batch)

        y = spread(y, 1)
        through, cov = (spread(v, 2, v.ndim > 2) for v in (through, cov))
        mask = data["mask"]
        shown = torch.ones(count, 1, dtype=torch.bool, device=y.device) if mask is None else mask
        shown = shown if mask is not None and mask.ndim == data["y"].ndim else shown[..., None]  # type: ignore[union-attr]
        shown = spread(shown, 1).expand(count, *batch, width)
        own = torch.eye(dim, dtype=y.dtype, device=y.device) if read is None else read
        asked = torch.zeros(count, dtype=torch.bool, device=y.device).index_fill(0, where, True)
        # Points that an exact observation of the whole state fixes are no part of the event.
        exact = (cov == 0).all(-1).all(-1) & shown.all(-1) & (width >= dim)
        known = exact | spread(self.prior.certain(chain, nodes)[..., None], 1)[..., 0]
        keep = asked.reshape(count, *(1,) * len(batch)) & ~known
        placed = y.new_zeros(count, *batch, dim).index_copy(0, where, align(x, 1, 1, batch).contiguous())
        joint = chain.log_evidence(
            torch.cat((placed, y), -1),
            torch.cat((own.expand(count, *batch, dim, size), through), -2),
            torch.nn.functional.pad(cov, (dim, 0, dim, 0)),
            torch.cat((keep[..., None].expand(count, *batch, dim), shown), -1),
        )
        evidence = self.log_evidence_of_data()
        kept = keep.reshape(count, -1).index_select(0, where)
        return (joint - evidence).to(self.dtype_at(path.ts)), kept
