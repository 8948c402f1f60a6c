"""The parameters of one path site's posterior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from stochdyn.core.gaussian.feedback import LinearFeedback
from stochdyn.core.gaussian.small import times
from stochdyn.core.networks import StateNetwork
from stochdyn.infer.coupling import Coupling
from stochdyn.infer.encoders import LikelihoodEncoder
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import Quadratic
from stochdyn.infer.mode import LinearStart, linear_feedback
from stochdyn.infer.spread import spread_of_paths
from stochdyn.infer.start import StartPosterior, StartPrior
from stochdyn.infer.view import SiteView

__all__ = ["PathSite"]


class _Clock(nn.Module):
    """The time on the unit interval."""

    def __init__(self, ts: Tensor) -> None:
        super().__init__()
        self.start = float(ts.min())
        self.span = float(ts.max()) - self.start

    def forward(self, t: Tensor) -> Tensor:
        return (t - self.start) / self.span


class PathSite(PyroModule):
    """Parameters of the posterior of one path site: free for each step, or read off the data by an encoder.

    Args:
        view: The site as the model presents it.
        start: The linearised posterior to start from; None starts at the prior.
        amortised: Whether an encoder sets the feedback.
        hidden: The widths of the control network's hidden layers; empty for none.
        context: The size of the encoder's summary.
    """

    def __init__(
        self,
        view: SiteView,
        start: LinearStart | None,
        *,
        amortised: bool,
        hidden: Sequence[int],
        context: int,
    ) -> None:
        super().__init__()
        self.amortised = self.reads_likelihood = amortised
        self.random_start = view.start is not None
        steps, size, count = view.scale.shape[0], view.state_size, view.scale.shape[-1]
        batch = view.batch()
        like = view.x0.detach()
        centre = view.reference()[:-1]
        if start is not None:
            feedback = linear_feedback(view, start.posterior, start.states)
            centre = feedback.remembered(start.states[:-1])
            size = centre.shape[-1]
        width = spread_of_paths(view, None if start is None else feedback, centre)
        self._set_coupling(None if start is None else start.posterior.coupling, like)
        self.register_buffer("width", width)
        lower = torch.tril_indices(count, count, -1)
        self._lower = (lower[0].tolist(), lower[1].tolist())
        self.count, self.size = count, size
        if amortised:
            self.encoder = LikelihoodEncoder(view.dim, context).to(like)
            self.head = nn.Linear(context, count + count * size + count + len(self._lower[0])).to(like)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            if view.start is not None:
                self.start_head = nn.Linear(context, 2 * view.start.mean.shape[-1]).to(like)
                nn.init.zeros_(self.start_head.weight)
                nn.init.zeros_(self.start_head.bias)
        else:
            self.register_buffer("centre", centre.detach().clone())
            if start is None:
                offset = like.new_zeros(steps, *batch, count)
                gain = like.new_zeros(steps, *batch, count, size)
                factor = torch.eye(count).to(like).expand(steps, *batch, count, count)
            else:
                law = feedback.law
                offset = law.offset + times(law.gain, centre)
                gain, factor = law.gain * width, law.factor
            self.offset = nn.Parameter(offset.detach().clone())
            self.gain = nn.Parameter(gain.detach().clone())
            self.log_diagonal = nn.Parameter(
                torch.diagonal(factor, dim1=-2, dim2=-1).log().detach().clone().contiguous()
            )
            # Optimisers and data-parallel training have no use for a parameter without elements.
            below = factor[..., self._lower[0], self._lower[1]].detach().clone()
            self.lower = nn.Parameter(below) if self._lower[0] else None
            if view.start is not None:
                self._set_start(view.start, start)
        self.network = None
        if hidden:
            self.network = StateNetwork(
                size,
                count,
                tuple(hidden),
                context=context if amortised else 0,
                time=_Clock(view.fn.ts),
                zero_last=True,
            ).to(like)

    def _set_start(self, prior: StartPrior, start: LinearStart | None) -> None:
        if start is not None and start.start_mean is not None and start.start_factor is not None:
            mean, factor = start.start_mean, start.start_factor
        else:
            mean = prior.mean
            factor = torch.linalg.cholesky(torch.linalg.inv(prior.precision))
        self.start_mean = nn.Parameter(mean.detach().clone().contiguous())
        diagonal = torch.diagonal(factor, dim1=-2, dim2=-1).log()
        self.start_log_diagonal = nn.Parameter(diagonal.detach().clone().contiguous())
        self.start_lower = nn.Parameter(torch.tril(factor, -1).detach().clone())

    def free_start(self) -> StartPosterior | None:
        """Return the free posterior of a random start; None if nothing is random."""
        if not self.random_start:
            return None
        tril = torch.tril(self.start_lower, -1) + torch.diag_embed(self.start_log_diagonal.exp())
        return StartPosterior(self.start_mean, tril)

    def _set_coupling(self, coupling: Coupling | None, like: Tensor) -> None:
        self.couples = coupling is not None
        if coupling is not None:
            self.register_buffer("coupling_rows", coupling.rows.detach().to(like))
            self.register_buffer("coupling_keep", coupling.keep.to(like))
            self.register_buffer("coupling_first", coupling.first)

    def _coupling(self) -> Coupling | None:
        if not self.couples:
            return None
        return Coupling(self.coupling_rows, self.coupling_keep, self.coupling_first)

    def _factor(self, log_diagonal: Tensor, lower: Tensor | None) -> Tensor:
        factor = torch.diag_embed(log_diagonal.exp())
        if lower is None or not self._lower[0]:
            return factor
        below = torch.zeros_like(factor)
        below[..., self._lower[0], self._lower[1]] = lower
        return factor + below

    def free_feedback(self, scale: Tensor) -> Feedback:
        """Return the feedback law of free parameters, for increments of the prior's ``scale (N, M)``."""
        factor = self._factor(self.log_diagonal, self.lower)
        law = LinearFeedback(self.offset, self.gain / self.width.unsqueeze(-2), factor, self.centre)
        return Feedback(law, scale, self.network, self.width, coupling=self._coupling())

    def reference(self, view: SiteView) -> Tensor:
        """Return the full states ``(T, *batch, Z)`` of the path without noise, at which the encoder reads the likelihood."""
        return view.run(view.zero_increments())

    def read(
        self, view: SiteView, reference: Tensor, data: Quadratic, keep_graph: bool
    ) -> tuple[Feedback, StartPosterior | None]:
        """Return the feedback law that the encoder reads off the likelihood around a reference path."""
        unit = self.width[..., : view.dim]
        summary = self.encoder(view.fn.ts, reference[..., : view.dim], data.precision, data.linear, unit)
        out = self.head(summary[1:])
        count, size = self.count, self.size
        offset, gain, log_diagonal, lower = out.split([count, count * size, count, len(self._lower[0])], -1)
        law = LinearFeedback(
            offset,
            gain.unflatten(-1, (count, size)) / self.width.unsqueeze(-2),
            self._factor(log_diagonal, lower),
            reference[:-1],
        )
        start = None
        if view.start is not None:
            stddev = torch.diagonal(view.start.precision, dim1=-2, dim2=-1).rsqrt()
            shift, log_scale = self.start_head(summary[0]).chunk(2, -1)
            start = StartPosterior(
                view.start.mean + stddev * shift, torch.diag_embed(stddev * log_scale.exp())
            )
        context = summary[1:] if self.network is not None else None
        return Feedback(law, view.scale, self.network, self.width, context), start
