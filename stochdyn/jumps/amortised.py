"""Amortised inference: rates and links of a panel from a trained network, in milliseconds, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, check_real, check_type
from stochdyn._lending import lent
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, SystemSizeError
from stochdyn.jumps.encoder import Encoded, RateEncoder, log_density
from stochdyn.jumps.panel import PanelData
from stochdyn.jumps.simulated_prior import LAGS, JumpPrior, LagCounts, count_transitions
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["AmortisedPosterior", "AmortisedRates"]

WEIGHTS = "amortised.safetensors"


@dataclass(frozen=True)
class AmortisedPosterior:
    """What the network says of a panel.

    Attributes:
        labels: The labels of the states.
        link_probs: The probability that each jump is possible, ``(S, S)``.
        log_mean: The mean of each log rate if the jump is possible, ``(S, S)``.
        log_std: The standard deviation of each log rate if the jump is possible, ``(S, S)``.
        outside: How the data differ from what the network was trained on, in words; empty if they don't.
    """

    labels: list[Any]
    link_probs: Tensor
    log_mean: Tensor
    log_std: Tensor
    outside: list[str]

    @property
    def rates(self) -> Tensor:
        """The posterior mean of the generator, ``(S, S)``, with its diagonal: impossible jumps count as zero."""
        off = self.link_probs * torch.exp(self.log_mean + 0.5 * self.log_std**2)
        off = off - torch.diag_embed(off.diagonal())
        return off - torch.diag_embed(off.sum(-1))

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw generators ``(*sample, S, S)``: links first, then rates of the possible jumps.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness.
        """
        shape, source = as_sample_shape(sample_shape), as_generator(generator)
        size = (*shape, *self.log_mean.shape)
        z = torch.randn(size, generator=source, dtype=self.log_mean.dtype)
        linked = torch.rand(size, generator=source, dtype=self.log_mean.dtype) < self.link_probs
        off = torch.exp(self.log_mean + self.log_std * z) * linked
        off = off - torch.diag_embed(off.diagonal(dim1=-2, dim2=-1))
        return off - torch.diag_embed(off.sum(-1))

    def report(self) -> str:
        """Return a table of the rates with intervals and probabilities of links, and what to beware of."""
        low, high = (
            torch.exp(self.log_mean - 1.96 * self.log_std),
            torch.exp(self.log_mean + 1.96 * self.log_std),
        )
        lines = [f"{'from':>12} {'to':>12} {'P(link)':>8} {'rate':>10} {'2.5 %':>10} {'97.5 %':>10}"]
        for i, a in enumerate(self.labels):
            for j, b in enumerate(self.labels):
                if i != j:
                    lines.append(
                        f"{a!s:>12} {b!s:>12} {float(self.link_probs[i, j]):8.2f} {float(self.log_mean[i, j].exp()):10.4g} "
                        f"{float(low[i, j]):10.4g} {float(high[i, j]):10.4g}"
                    )
        return "\n".join([*lines, *(f"Beware: {text}" for text in self.outside)])


class AmortisedRates(Objective):
    r"""A network that maps the counts and gaps of a panel to a posterior of its rates and links.

    It is trained on panels simulated from a prior, by the mean log density of the truth, so that its answer approaches the
    posterior under that prior: a probability of each link, and a normal law of the log rate of a possible one. Use it
    for a start of :func:`fit_rates`, for labels that may be wrong at an unknown rate, or for many panels; where labels are right,
    ``fit_rates`` has the exact likelihood.

    Args:
        encoder: The network; a new one if None.
        prior: The law of what it is trained on; the default one if None.
        batch_size: The number of data sets per step of training, all with one number of states.

    Example:
        >>> network = AmortisedRates.load()
        >>> data = {"id": [0] * 9, "t": [0.1 * k for k in range(9)], "s": [0, 0, 1, 1, 1, 0, 0, 1, 1]}
        >>> network.posterior(PanelData(data, "id", "t", "s")).rates.shape
        torch.Size([2, 2])

    Reference:
        Berghaus, Cvejoski, Seifner, Ojeda and Sánchez, "Foundation inference models for Markov jump processes", 2024, for
        the idea; the network, its prior and its training are others.
    """

    summary_mean: Tensor
    summary_whiten: Tensor
    summary_limit: Tensor

    def __init__(
        self, encoder: RateEncoder | None = None, prior: JumpPrior | None = None, batch_size: int = 32
    ) -> None:
        super().__init__()
        self.encoder = RateEncoder() if encoder is None else encoder
        self.prior = JumpPrior() if prior is None else prior
        check_type(self.encoder, RateEncoder, "encoder")
        check_type(self.prior, JumpPrior, "prior")
        self.batch_size = batch_size
        width = self.encoder.head.in_features
        self.register_buffer("summary_mean", torch.zeros(width))
        self.register_buffer("summary_whiten", torch.zeros(width, width))
        self.register_buffer("summary_limit", torch.tensor(float("inf")))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Simulate data sets of a random number of states, and return minus the mean log density of their truth per pair of states."""
        low, high = self.prior.num_states
        size = int(torch.randint(low, high + 1, ()))
        data = self.prior.sample(size, self.batch_size)
        value = log_density(self.encoder(data.seen), data.log_rates, data.links)
        return ObjectiveValue(-value.mean() / (size * (size - 1)), {}, "surrogate")

    @torch.no_grad()
    def learn_range(self, num_samples: int = 4000, generator: Generator = None) -> None:
        """Learn, after training, what is usual: mean and covariance of the pooled summaries, and the range of their distances.

        Args:
            num_samples: The number of simulated data sets.
            generator: The source of randomness.
        """
        source = as_generator(generator)
        low, high = self.prior.num_states
        per_size = max(1, num_samples // (high - low + 1))
        summaries = torch.cat(
            [
                self.encoder(self.prior.sample(size, part, source).seen).summary
                for size in range(low, high + 1)
                for part in [64] * (per_size // 64 + 1)
            ]
        )
        mean = summaries.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(summaries.mT).double())
        whiten = (vectors / values.clamp(min=1e-4 * float(values.max())).sqrt()).float()
        distance = ((summaries - mean) @ whiten).square().sum(-1)
        self.summary_mean.copy_(mean)
        self.summary_whiten.copy_(whiten)
        # one simulated data set in a thousand lies further out
        self.summary_limit.copy_(distance.quantile(0.999))

    @classmethod
    def load(cls) -> AmortisedRates:
        """Return the network that comes with the library, trained by ``python -m stochdyn.jumps.training``."""
        from safetensors.torch import load

        weights = load((files("stochdyn.jumps") / WEIGHTS).read_bytes())
        with lent(0):  # weights drawn to be replaced at once
            network = cls()
        network.load_state_dict(weights)
        return network.eval()

    @torch.no_grad()
    def posterior(self, panel: PanelData, label_error: float | None = 0.0) -> AmortisedPosterior:
        """Return what the network says of a panel.

        Intervals are calibrated for every number of states at a label error that is told, and on average over label errors up to the
        largest of the training where it isn't. Labels of two states hardly tell errors from fast jumps: if one label in ten is
        wrong and the network isn't told, its intervals are too narrow (95 % ones hold the rate in 90 of 100 panels).

        Args:
            panel: The visits.
            label_error: The probability that a visit's label is wrong, and then any other one; None if it isn't known.

        Raises:
            SystemSizeError: If the panel has more states than the network was trained for.
            InvalidInputError: If some states are entered at exact times: the network knows visits only.
        """
        check_type(panel, PanelData, "panel")
        if label_error is not None:
            check_real(label_error, "label_error", minimum=0.0)
        if panel.num_states > self.prior.num_states[1]:
            raise SystemSizeError(
                "the panel has too many states for the network",
                got=panel.num_states,
                expected=f"at most {self.prior.num_states[1]}",
                hint="fit_rates takes any number",
            )
        if panel.exact_entry:
            raise InvalidInputError(
                "the network knows visits only, no exact times of entry",
                got=[panel.labels[k] for k in panel.exact_entry],
                hint="use fit_rates",
            )
        seen = summarise(panel, label_error)
        encoded = self.encoder(seen)
        return AmortisedPosterior(
            list(panel.labels),
            encoded.link_logit[0].double().sigmoid().fill_diagonal_(0.0),
            encoded.mean[0].double(),
            encoded.log_std[0].double().exp(),
            self._outside(seen, encoded),
        )

    def _outside(self, seen: LagCounts, encoded: Encoded) -> list[str]:
        """Say how a data set differs from those of the training."""
        found, prior = [], self.prior
        series = int(seen.num_series[0])
        if not prior.num_series[0] <= series <= prior.num_series[1]:
            found.append(
                f"{series} series, where training had {prior.num_series[0]} to {prior.num_series[1]}"
            )
        length = float(seen.counts[0, 0].sum()) / max(series, 1) + 1
        if not 0.8 * prior.length[0] <= length <= 1.25 * prior.length[1]:
            found.append(
                f"{length:.0f} visits per series, where training had {prior.length[0]} to {prior.length[1]}"
            )
        error = float(seen.label_error[0])
        if error > prior.label_error:
            found.append(
                f"labels wrong with probability {error:g}, where training had at most {prior.label_error:g}"
            )
        share = seen.counts[0, 0]
        never = int((share.sum(-1) == 0).sum())
        if never:
            found.append(f"{never} states were never left or held between two visits")
        stay = share.diagonal() / share.sum(-1).clamp(min=1)
        if float(stay.max()) < 0.4:
            found.append("nearly every interval holds a jump: fast rates are known by their ratios only")
        distance = float(((encoded.summary[0] - self.summary_mean) @ self.summary_whiten).square().sum())
        if distance > float(self.summary_limit):
            found.append(
                f"the counts are unlike those of training (distance {distance:.0f}, of which one in a thousand exceeds "
                f"{float(self.summary_limit):.0f})"
            )
        return found


def summarise(panel: PanelData, label_error: float | None) -> LagCounts:
    """Return what the network sees of a panel."""
    states, times = panel.rows()
    sets = torch.zeros(len(states), dtype=torch.long)
    gap: list[Tensor] = []
    variation: list[Tensor] = []
    for lag in LAGS:
        span = times[:, lag:] - times[:, :-lag]
        span = span[states[:, lag:] >= 0]
        gap.append(span.mean() if len(span) else gap[0] * lag)
        variation.append(span.std(correction=0) / span.mean() if len(span) else torch.zeros(()))
    error = float("nan") if label_error is None else float(label_error)
    return LagCounts(
        count_transitions(states, sets, 1, panel.num_states),
        torch.stack(gap)[None].float(),
        torch.stack(variation)[None].float(),
        torch.tensor([len(states)]),
        torch.tensor([error]),
    )
