"""A path posterior that is recomputed for every draw of the other latent sites."""

from __future__ import annotations

import torch
from pyro.nn import PyroModule
from torch import Tensor

from stochdyn.infer.feedback import Feedback
from stochdyn.infer.linearise import Quadratic, linear_posterior
from stochdyn.infer.mode import LinearStart, linear_feedback
from stochdyn.infer.spread import spread_of_paths
from stochdyn.infer.start import StartPosterior
from stochdyn.infer.view import SiteView

__all__ = ["RecomputedSite"]


class RecomputedSite(PyroModule):
    r"""The exact feedback law of the model linearised around a fixed path, given each draw of the other sites.

    :math:`q(x\mid\theta)` then follows :math:`\theta` wherever it goes: a linear-Gaussian path is marginalised
    exactly, and the law of :math:`\theta` comes out neither too narrow nor too wide on account of the path. It has no
    parameters; gradients in :math:`\theta` pass through the recursion.

    Args:
        view: The site as the model presents it.
        start: The posterior linearised around the most probable path, at the centre of the other sites.
    """

    #: Whether the law is read off the likelihood at every call.
    reads_likelihood = True

    def __init__(self, view: SiteView, start: LinearStart) -> None:
        super().__init__()
        self.random_start = view.start is not None
        feedback = linear_feedback(view, start.posterior, start.states)
        spread_of_paths(view, feedback, feedback.remembered(start.states[:-1]))
        self.register_buffer("states", start.states.detach().clone())
        self.register_buffer("increments", start.increments.detach().clone())

    def reference(self, view: SiteView) -> Tensor:
        """Return the full states ``(T, *batch, Z)`` around which the likelihood is expanded."""
        return _spread(self.states, view.batch())

    def read(
        self, view: SiteView, reference: Tensor, data: Quadratic, keep_graph: bool
    ) -> tuple[Feedback, StartPosterior | None]:
        """Return the law of the increments, and that of a random start, for the present values of the other sites.

        Args:
            view: The site as the model presents it with these values.
            reference: The states at which the log likelihood was expanded.
            data: The expansion of the log-likelihood.
            keep_graph: Whether gradients reach the other sites.
        """
        increments = _spread(self.increments, view.batch())
        posterior = linear_posterior(view.linear_steps(reference, increments, keep_graph), data)
        start = None
        if view.start is not None:
            mean, factor = view.start.posterior(posterior.start_precision, posterior.start_linear)
            start = StartPosterior(mean.to(reference.dtype), factor.to(reference.dtype))
        return linear_feedback(view, posterior, reference), start


def _spread(x: Tensor, batch: torch.Size) -> Tensor:
    """Give ``x (N, *b, Z)`` the batch axes of the draws."""
    lead = len(batch) - (x.ndim - 2)
    return (
        x.reshape(x.shape[0], *(1,) * lead, *x.shape[1:]).expand(x.shape[0], *batch, x.shape[-1]).contiguous()
    )
