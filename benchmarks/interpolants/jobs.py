"""Practitioners' jobs, from data to figures: images by label, restoration of images, translation between two samples."""

from __future__ import annotations

import time
from typing import Any

import torch
from data import eight_gaussians, moons
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.interpolants import (
    CoupledBatches,
    FieldNetwork,
    Interpolant,
    InterpolantRegression,
    MeanReverting,
    NetworkAdapter,
    PreconditionedScore,
    ScoreMatching,
)

__all__ = ["measure"]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the 8 x 8 handwritten digits of scikit-learn on [-1, 1]: images and labels to train on, and others."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1500], order[1500:]
    return images[train], labels[train], images[test], labels[test]


class Convolutions(nn.Module):
    """A small residual network of images, called as ``net(x, timesteps, labels)`` as diffusion models are."""

    def __init__(self, channels: int = 32, num_classes: int = 11) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.label = nn.Embedding(num_classes, channels)
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.wide = nn.Linear(channels * 64, channels)
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return an image for each image."""
        h = self.first(x)
        seen = self.time(timesteps[:, None] / 1000) + self.label(labels)
        for block in self.blocks:
            h = h + block(nn.functional.silu(h + seen[:, :, None, None]))
            # what all pixels say together
            seen = seen + self.wide(h.flatten(1))
        return self.last(nn.functional.silu(h))


def labelled_images(smoke: bool) -> dict[str, Any]:
    """Draw digits by label: how many does a classifier of real digits read as asked, at which guidance?"""
    from sklearn.linear_model import LogisticRegression

    images, labels, test, test_labels = digits()
    reader = LogisticRegression(max_iter=2000).fit(images.flatten(1).numpy(), labels.numpy())
    steps = 10 if smoke else 1200
    torch.manual_seed(0)
    net = NetworkAdapter(Convolutions(), time_first=False, time="flat", time_scale=1000.0)
    objective = InterpolantRegression(
        Interpolant("one-sided-linear"), velocity=net, condition_dropout=0.1, null_condition=10
    )
    noised = images + (torch.rand(images.shape) - 0.5) / 8
    start = time.process_time()
    sd.fit(
        objective, {"x1": noised, "condition": labels}, steps=steps, batch_size=128, lr=2e-3, ema=0.995, seed=0,
        progress=False, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    cost = time.process_time() - start
    model = objective.generator()
    asked = torch.arange(10).repeat_interleave(2 if smoke else 30)
    accuracy = {}
    for guidance in (1.0, 2.0, 4.0):
        drawn = model.sample(len(asked), num_steps=25, condition=asked, guidance=guidance, generator=0)
        accuracy[guidance] = float(
            (torch.from_numpy(reader.predict(drawn.flatten(1).numpy())) == asked).double().mean()
        )
    real = float(reader.score(test.flatten(1).numpy(), test_labels.numpy()))
    few = slice(0, 2 if smoke else 64)
    with torch.no_grad():
        bits = model.bits_per_dim(
            test[few] + (torch.rand(test[few].shape) - 0.5) / 8, 1 / 8, exact=False, num_steps=20,
            condition=test_labels[few], generator=0,
        )  # fmt: skip
    return {
        "read as asked": accuracy, "read of real digits": real, "bits per dimension": float(bits.mean()),
        "processor seconds": round(cost, 1), "steps": steps,
    }  # fmt: skip


def degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """Average blocks of 2 x 2 pixels and add noise of 0.1: what is to be undone."""
    small = nn.functional.avg_pool2d(images, 2)
    blocks = nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    return blocks + 0.1 * torch.randn(images.shape, generator=generator)


def regression(bad: Tensor, clean: Tensor, steps: int) -> FieldNetwork:
    """Train a network of the score's size to say what has to be added to degraded images."""
    torch.manual_seed(0)
    net = FieldNetwork(64, width=256, depth=6, skips=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(clean), (256,))
        optimizer.zero_grad()
        (bad[rows] + net(torch.zeros(256, 1), bad[rows]) - clean[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def restored_images(smoke: bool) -> dict[str, Any]:
    """Restore digits by a process that reverts to the degraded one: how near are they, and do they look like digits?

    A draw from a posterior has twice the squared error of the posterior's mean, which no other estimate beats. So the mean of the
    draws stands beside regressions as to error, and draws stand beside them as to whether a classifier can tell them from images.
    """
    images, _, test, _ = digits()
    g = torch.Generator().manual_seed(1)
    many = images.repeat(8, 1, 1, 1)
    bad, bad_test = degraded(many, g).flatten(1), degraded(test, g).flatten(1)
    clean, clean_test = many.flatten(1), test.flatten(1)
    steps, num_draws = (10, 2) if smoke else (2500, 32)
    torch.manual_seed(0)
    process = MeanReverting(0.0, spread=0.3, rate_first=0.1, rate_last=8.0)
    score = PreconditionedScore.from_data(
        process, clean, bad, width=256, depth=6, condition_dim=64, skips=True
    )
    objective = ScoreMatching(process, score=score)
    start = time.process_time()
    sd.fit(
        objective, {"x1": clean, "condition": bad, "mean": bad}, steps=steps, batch_size=256, lr=2e-3, ema=0.995,
        seed=0, progress=False, scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    cost = time.process_time() - start
    model = objective.generator()
    draws = torch.stack(
        [
            model.sample(
                len(bad_test), "sde", 20 if smoke else 40, condition=bad_test, mean=bad_test, generator=k
            )
            for k in range(num_draws)
        ]
    )
    # the best linear map from degraded to clean images, and a network, for comparison
    ones = torch.ones(len(bad), 1)
    linear = torch.linalg.lstsq(torch.cat([bad, ones], 1), clean).solution
    net = regression(bad, clean, steps)
    rows = {
        "degraded": bad_test,
        "best linear map": torch.cat([bad_test, torch.ones(len(bad_test), 1)], 1) @ linear,
        "regression by a network": bad_test + net(torch.zeros(len(bad_test), 1), bad_test),
        "mean of 32 draws": draws.mean(0),
        "one draw": draws[0],
    }
    others = images.flatten(1)[: len(clean_test)]
    told = {
        name: float(sd.diagnostics.c2st(x, others, folds=2 if smoke else 5, width=64).mean)
        for name, x in {"clean": clean_test, **rows}.items()
    }
    energy = clean_test.reshape(-1, 8, 8).diff(dim=-1).square().mean()
    return {
        "psnr": {name: float(sd.diagnostics.psnr(x, clean_test, data_range=2.0).mean()) for name, x in rows.items()},
        "told from clean images": told,
        "gradient energy over that of clean images": {
            name: float(x.reshape(-1, 8, 8).diff(dim=-1).square().mean() / energy) for name, x in rows.items()
        },
        "processor seconds": round(cost, 1), "steps": steps,
    }  # fmt: skip


def translated_samples(smoke: bool) -> dict[str, Any]:
    """Carry two moons to eight Gaussians and back, with plans made beside the training."""
    g = torch.Generator().manual_seed(0)
    a, b = moons(5000, g), eight_gaussians(4000, g)
    steps = 10 if smoke else 1500
    torch.manual_seed(0)
    objective = InterpolantRegression(Interpolant("linear", "zero"), velocity=FieldNetwork(2, width=64))
    pairs = CoupledBatches(a, b, "ot", batch_size=256, slices=4)
    start = time.process_time()
    sd.fit(
        objective, pairs, steps=steps, lr=3e-3, seed=0, progress=False,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    )  # fmt: skip
    cost = time.process_time() - start
    model = objective.generator()
    x, y, other = moons(1000, g), eight_gaussians(1000, g), eight_gaussians(1000, g)
    there = model.push(x, 10)
    return {
        "w2 there": sd.diagnostics.emd(there, y, 2), "floor": sd.diagnostics.emd(other, y, 2),
        "w2 before": sd.diagnostics.emd(x, y, 2),
        "there and back": float((model.push(there, 10, backward=True) - x).norm(dim=-1).mean()),
        "mean squared way over that of the plan": float((there - x).square().sum(-1).mean()) / sd.diagnostics.emd(x, y, 2) ** 2,
        "processor seconds": round(cost, 1), "steps": steps,
    }  # fmt: skip


def measure(smoke: bool, seeds: int, steps: int) -> dict[str, Any]:
    """Measure all three."""
    return {
        "images by label": labelled_images(smoke),
        "restoration": restored_images(smoke),
        "translation": translated_samples(smoke),
    }
