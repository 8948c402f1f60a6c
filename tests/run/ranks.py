"""What each of two ranks does in the tests of data-parallel training; run under ``torchrun``."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import stochdyn.run.engine as engine_module
import stochdyn.run.progress as progress_module
from stochdyn.errors import CheckpointWriteError, NonFiniteLossError, StochdynError
from stochdyn.objectives import ObjectiveValue
from stochdyn.run import EarlyStopping, FitState, fit
from tests.run.toys import Noisy, Quadratic, Regression, regression_data, weights

STEPS = 12


class Particles(Quadratic):
    """Draws its own noise, as the particles of a variational bound do, and keeps it."""

    def forward(self, batch: Any = None) -> ObjectiveValue:
        self.noise = torch.randn(3)
        return ObjectiveValue((self.theta * self.noise).sum() + self.theta.square().sum())


class BreaksOnRankOne(Regression):
    """A finite gradient and an infinite loss, on one rank only."""

    calls = 0

    def forward(self, batch: Any = None) -> ObjectiveValue:
        self.calls += 1
        value = super().forward(batch)
        bad = self.calls == 5 and dist.get_rank() == 1
        return ObjectiveValue(value.loss + float("inf") if bad else value.loss, value.terms)


def one_gradient(rank: int, out: dict[str, torch.Tensor]) -> None:
    """One step of gradient descent with lr 1 moves by minus the gradient."""
    objective = Regression(dtype=torch.float64)
    data = regression_data(dtype=torch.float64)
    result = fit(objective, data, steps=1, lr=1.0, batch_size=5, optimizer=torch.optim.SGD, progress=False)
    out.update({f"gradient/{n}": v for n, v in weights(objective).items()})
    out["gradient_loss"] = result.losses


def long_run(rank: int, out: dict[str, torch.Tensor]) -> None:
    objective = Regression()
    # Ranks that start apart must be brought together.
    with torch.no_grad():
        objective.net[0].weight += rank
    result = fit(objective, regression_data(), steps=STEPS, lr=0.02, batch_size=4, ema=0.9, distributed=True)
    out.update({f"long/{n}": v for n, v in weights(objective).items()})
    out["long_losses"] = result.losses
    assert result.ema is not None
    out["long_ema"] = result.ema["net.0.weight"]


def particles(rank: int, out: dict[str, torch.Tensor]) -> None:
    objective = Particles(torch.zeros(3))
    fit(objective, steps=1, lr=1.0, optimizer=torch.optim.SGD, progress=False)
    out["noise"], out["particle_step"] = objective.noise, objective.theta.detach()


def pyro_bound(rank: int, out: dict[str, torch.Tensor]) -> None:
    """Pyro's bound as a module, with a guide that makes its parameters in the first call."""
    import pyro
    import pyro.distributions as dist_
    from pyro.infer import Trace_ELBO
    from pyro.infer.autoguide import AutoNormal, init_to_sample

    def model(y: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist_.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist_.Normal(mean, 1.0), obs=y)

    pyro.set_rng_seed(rank)
    guide = AutoNormal(model, init_loc_fn=init_to_sample)
    bound = Trace_ELBO(num_particles=4, vectorize_particles=True)(model, guide)
    y = torch.linspace(1.0, 3.0, 16)
    fit(bound, (y,), steps=300, lr=0.05, progress=False)
    out.update({f"pyro/{n}": v for n, v in weights(guide).items()})


def resumed(rank: int, out: dict[str, torch.Tensor], folder: Path) -> None:
    def go(name: str, steps: int, checkpoint: Path | None, resume: bool) -> None:
        objective = Noisy()
        result = fit(
            objective,
            regression_data(),
            steps=steps,
            batch_size=3,
            progress=False,
            checkpoint=checkpoint,
            resume=resume,
            distributed={"gradient_as_bucket_view": True},
        )
        out.update({f"{name}/{n}": v for n, v in weights(objective).items()})
        out[f"{name}_losses"] = result.losses

    go("half", STEPS, folder, False)
    go("resumed", 2 * STEPS, folder, True)
    go("straight", 2 * STEPS, None, False)


def errors(rank: int, out: dict[str, torch.Tensor], folder: Path) -> list[str]:
    said = []

    def note(action: Any, *kinds: type[StochdynError]) -> None:
        try:
            action()
            said.append("nothing")
        except kinds as error:
            said.append(f"{type(error).__name__}: {error}")

    broken = BreaksOnRankOne()
    note(
        lambda: fit(broken, regression_data(), steps=9, batch_size=4, progress=False, log_every=3),
        NonFiniteLossError,
    )
    out.update({f"broken/{n}": v for n, v in weights(broken).items()})

    def refuse(*args: Any) -> None:
        raise CheckpointWriteError("full", got=os.strerror(errno.ENOSPC))

    real = engine_module.write_checkpoint
    engine_module.write_checkpoint = refuse
    note(
        lambda: fit(Quadratic(torch.ones(1)), steps=2, progress=False, checkpoint=folder / "full"),
        CheckpointWriteError,
    )
    engine_module.write_checkpoint = real
    return said


def stops(rank: int, out: dict[str, torch.Tensor]) -> None:
    """A callback that wants to stop on one rank only stops both, at the next look."""

    def stop(state: FitState) -> None:
        if rank == 1 and state.step == 4:
            state.request_stop()

    result = fit(Quadratic(torch.ones(1)), steps=30, log_every=6, progress=False, callbacks=[stop])
    out["stopped_at"] = torch.tensor([result.steps, int(result.stopped_early)])
    early = fit(
        Quadratic(torch.ones(1)),
        steps=30,
        lr=1e-9,
        log_every=4,
        progress=False,
        callbacks=[EarlyStopping(2, every=3, min_delta=0.1)],
    )
    out["early_at"] = torch.tensor([early.steps, int(early.stopped_early)])


def main(folder: Path) -> None:
    progress_module.DELAY = 0.0
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    out: dict[str, torch.Tensor] = {}
    one_gradient(rank, out)
    long_run(rank, out)
    particles(rank, out)
    pyro_bound(rank, out)
    resumed(rank, out, folder / "checkpoint")
    stops(rank, out)
    said = errors(rank, out, folder)
    alone = Regression()
    fit(alone, regression_data(), steps=2, progress=False, distributed=False, seed=rank, batch_size=4)
    out.update({f"alone/{n}": v for n, v in weights(alone).items()})
    save_file({n: v.contiguous() for n, v in out.items()}, folder / f"rank{rank}.safetensors")
    (folder / f"said{rank}.txt").write_text("\n".join(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
