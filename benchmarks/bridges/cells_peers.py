"""OT-CFM and SF2M as TorchCFM's single-cell runner trains them: one network of time over all intervals."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["FlowMatching"]

STEPS = 100


class FlowMatching:
    """Train on the snapshots but one, and push the cells of the snapshot before it on.

    Args:
        kind: ``"OT-CFM"`` (exact minibatch coupling, sigma 0.1) or ``"SF2M"`` (the same with a score network, sigma 0.1).
        times: of the training snapshots.
        clouds: their cells, float32.
        steps: of training; each is a batch of 128 pairs of one interval, in turn.
        seed: of everything.
    """

    def __init__(self, kind: str, times: list[float], clouds: list[Tensor], steps: int, seed: int) -> None:
        from torchcfm.conditional_flow_matching import (
            ExactOptimalTransportConditionalFlowMatcher,
            SchrodingerBridgeConditionalFlowMatcher,
        )

        torch.manual_seed(seed)
        self.sigma, self.stochastic = 0.1, kind == "SF2M"
        if self.stochastic:
            matcher = SchrodingerBridgeConditionalFlowMatcher(self.sigma, ot_method="exact")
        else:
            matcher = ExactOptimalTransportConditionalFlowMatcher(self.sigma)
        dim = clouds[0].shape[1]
        self.velocity = _network(dim)
        self.score = _network(dim) if self.stochastic else None
        parameters = list(self.velocity.parameters())
        parameters += list(self.score.parameters()) if self.score is not None else []
        optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-5)
        pairs = list(itertools.pairwise(zip(times, clouds, strict=True)))
        for k in range(steps):
            (start, x), (end, y) = pairs[k % len(pairs)]
            a, b = (z[torch.randint(len(z), (128,))] for z in (x, y))
            t, xt, ut, noise = matcher.sample_location_and_conditional_flow(a, b, return_noise=True)
            inputs = torch.cat((xt, (start + (end - start) * t)[:, None]), -1)
            loss = (self.velocity(inputs) - ut / (end - start)).square().mean()
            if self.score is not None:
                weight = matcher.compute_lambda(t)[:, None]
                loss = loss + (weight * self.score(inputs) + noise).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    @torch.no_grad()
    def push(self, x: Tensor, start: float, stop: float, length: float) -> Tensor:
        """Run cells from ``start`` to ``stop``; ``length`` is that of the training interval, in whose units the noise is."""
        dt = (stop - start) / STEPS
        for k in range(STEPS):
            inputs = torch.cat((x, torch.full_like(x[:, :1], start + k * dt)), -1)
            move = self.velocity(inputs)
            if self.score is not None:
                move = move + self.score(inputs) / length
                x = x + self.sigma * (dt / length) ** 0.5 * torch.randn_like(x)
            x = x + dt * move
        return x


def _network(dim: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (dim + 1, 64, 64):
        layers += [nn.Linear(width, 64), nn.SELU()]
    return nn.Sequential(*layers, nn.Linear(64, dim))
