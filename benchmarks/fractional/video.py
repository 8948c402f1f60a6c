"""The latent video SDE on stochastic moving digits: fractional against Brownian noise.

    OMP_NUM_THREADS=2 python benchmarks/fractional/video.py                    # 32 x 32 pixels, 16 frames, on a CPU
    python benchmarks/fractional/video.py --paper --device cuda --steps 187500 # 64 x 64 pixels, 25 frames

Both models train on the same videos from the same seeds. It writes ``results/video.json`` (``video_paper.json``) with the
evidence bound on held-out videos of unseen digits, the PSNR of reconstructions and of predictions after five frames, and the learned
Hurst index, and with ``--figure`` a picture of predictions. Training resumes from ``--checkpoint`` if it was cut off.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor

import stochdyn as sd
from stochdyn.datasets import moving_digits
from stochdyn.diagnostics import psnr
from stochdyn.fractional import VideoModel

RESULTS = Path(__file__).parent / "results"
SEEN = 5


def build(noise: str, paper: bool) -> VideoModel:
    """Return the model of one row of the table."""
    return VideoModel.paper(noise) if paper else VideoModel(noise=noise)


@torch.no_grad()
def evaluate(model: VideoModel, videos: Tensor, num_samples: int) -> dict[str, float]:
    """Return bound, PSNR of reconstructions and of predictions: of the best sample a video and of the mean frame."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    rows: dict[str, list[float]] = {}
    torch.manual_seed(2)
    for part in videos.split(32):
        batch = part.to(device)
        truth = batch / 255
        terms = [model(batch).terms for _ in range(4)]
        row = {n: float(torch.stack([t[n] for t in terms]).mean()) for n in ("elbo", "squared_error", "kl")}
        row["psnr reconstruction"] = float(
            psnr(model.reconstruct(batch, 16, generator), truth, data_range=1.0, dim=(-3, -2, -1)).mean()
        )
        ahead = model.predict(batch[:, :SEEN], batch.shape[1], num_samples, generator)[:, :, SEEN:]
        samples = psnr(ahead, truth[:, SEEN:].expand_as(ahead), data_range=1.0, dim=(-3, -2, -1)).mean(-1)
        row["psnr prediction, best sample"] = float(samples.max(0).values.mean())
        row["psnr prediction, one sample"] = float(samples.mean())
        row["psnr prediction, mean frame"] = float(
            psnr(ahead.mean(0), truth[:, SEEN:], data_range=1.0, dim=(-3, -2, -1)).mean()
        )
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in rows.items()}


def train(noise: str, arguments: argparse.Namespace) -> tuple[VideoModel, dict[str, Any]]:
    """Train and evaluate one model."""
    torch.manual_seed(arguments.seed)
    model = build(noise, arguments.paper)
    generator = torch.Generator().manual_seed(3)
    train_videos = moving_digits(arguments.videos, model.num_frames, model.size, generator=generator)
    test_videos = moving_digits(
        arguments.test_videos, model.num_frames, model.size, split="test", generator=generator
    )
    folder = None if arguments.checkpoint is None else Path(arguments.checkpoint) / noise
    start, clock = time.process_time(), time.perf_counter()
    reached = 0

    def watch(state: sd.run.FitState) -> None:
        nonlocal reached
        reached = state.step
        if arguments.hours is not None and time.perf_counter() - clock > 3600 * arguments.hours:
            signal.raise_signal(signal.SIGINT)  # the step is finished and saved, and the next call goes on

    result = sd.fit(
        model,
        train_videos,
        steps=arguments.steps,
        lr=arguments.lr,
        batch_size=arguments.batch,
        seed=arguments.seed,
        device=arguments.device,
        clip_norm=100.0,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(
            o, arguments.steps, 0.05 * arguments.lr
        ),
        checkpoint=folder,
        resume=folder is not None,
        progress=not arguments.quiet,
        callbacks=[watch],
        on_interrupt="return",
    )
    row: dict[str, Any] = {
        "noise": noise,
        "steps": reached,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    row["processor minutes"] = (time.process_time() - start) / 60
    row["minutes"] = (time.perf_counter() - clock) / 60
    row["training elbo"] = float(result.terms["elbo"][-200:].mean())
    row["hurst"] = None if model.hurst is None else float(model.hurst.detach().mean())
    row |= evaluate(model, test_videos, arguments.samples)
    return model, row


def draw(models: dict[str, VideoModel], path: Path) -> None:
    """Draw a held-out video, its reconstructions and two predictions of each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = next(iter(models.values()))
    device = next(first.parameters()).device
    generator = torch.Generator().manual_seed(5)
    video = moving_digits(1, first.num_frames, first.size, split="test", generator=generator).to(device)
    rows = [("truth", video[0, :, 0].cpu() / 255)]
    for name, model in models.items():
        rows.append((f"{name}, reconstruction", model.reconstruct(video, 16)[0, :, 0].cpu()))
        ahead = model.predict(video[:, :SEEN], first.num_frames, 2)
        rows += [(f"{name}, prediction", ahead[s, 0, :, 0].cpu()) for s in range(2)]
    figure, axes = plt.subplots(
        len(rows), first.num_frames, figsize=(0.6 * first.num_frames + 1.6, 0.65 * len(rows)), squeeze=False
    )
    for line, (name, frames) in zip(axes, rows, strict=True):
        for axis, frame in zip(line, frames, strict=True):
            axis.imshow(frame, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.16, right=0.99, top=0.98, bottom=0.02, wspace=0.05, hspace=0.05)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paper", action="store_true", help="64 x 64 pixels, 25 frames, larger networks")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--videos", type=int, default=20000)
    parser.add_argument("--test-videos", type=int, default=256)
    parser.add_argument("--samples", type=int, default=20, help="predictions a video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hours",
        type=float,
        default=None,
        help="stop each model after so long; with --checkpoint the next call goes on",
    )
    parser.add_argument("--device", default=None)
    parser.add_argument("--checkpoint", default=None, help="folder to save to and to resume from")
    parser.add_argument("--noise", nargs="+", default=["brownian", "fractional"])
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.videos, arguments.test_videos, arguments.samples = 3, 64, 32, 2
    if arguments.hours is not None:
        # started in the background, a program doesn't hear the signal by which the hours end
        signal.signal(signal.SIGINT, signal.default_int_handler)
    models, rows = {}, []
    for noise in arguments.noise:
        models[noise], row = train(noise, arguments)
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    out = arguments.out or (
        None if arguments.smoke else RESULTS / f"video{'_paper' if arguments.paper else ''}.json"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        where = machine("torchsde", "pyro-ppl", "jax", "diffrax") | {"device": str(arguments.device or "cpu")}
        setting = {
            k: v
            for k, v in vars(arguments).items()
            if k in ("steps", "lr", "batch", "videos", "test_videos", "samples", "seed")
        }
        out.write_text(
            json.dumps({"machine": where, "setting": setting, "rows": rows}, indent=1) + "\n",
            encoding="utf-8",
        )
        print(f"wrote {out}")
    if arguments.figure is not None:
        draw(models, arguments.figure)
        print(f"wrote {arguments.figure}")


if __name__ == "__main__":
    main()
