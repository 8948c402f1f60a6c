"""A trained model is a thing to ship: what was saved, loaded, moved or resumed samples as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.interpolants import (
    OU,
    FieldNetwork,
    Interpolant,
    InterpolantRegression,
    MeanReverting,
    PotentialNetwork,
    ScoreMatching,
)

X1 = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 3
X0 = torch.randn(60, 2, generator=torch.Generator().manual_seed(1)) - 5


def one_sided() -> Any:
    return InterpolantRegression(Interpolant("one-sided-linear"), velocity=FieldNetwork(2, 8, 1))


def two_sided() -> Any:
    return InterpolantRegression(
        Interpolant(),
        velocity=FieldNetwork(2, 8, 1),
        noise_prediction=FieldNetwork(2, 8, 1),
        null_condition=0,
    )


def with_base() -> Any:
    base = torch.distributions.MultivariateNormal(torch.ones(2), torch.eye(2))
    return InterpolantRegression(Interpolant(), velocity=FieldNetwork(2, 8, 1), base=base)


def diffusion() -> Any:
    return ScoreMatching(OU(), potential=PotentialNetwork(OU(), 2, 8, 1))


def reverting() -> Any:
    return ScoreMatching(MeanReverting(torch.ones(2)), score=FieldNetwork(2, 8, 1))


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {
    "one-sided": (one_sided, X1),
    "two-sided": (two_sided, (X0, X1)),
    "with a base": (with_base, X1),
    "diffusion": (diffusion, X1),
    "mean reversion": (reverting, X1),
}


def trained(make: Callable[[], Any], data: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    objective = make()
    sd.fit(objective, data, steps=6, batch_size=20, progress=False, **options)
    return objective


def draws(model: nn.Module) -> Tensor:
    return model.sample(7, num_steps=3, generator=0)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    objective = trained(make, data)
    model = objective.generator()
    sd.save(model, tmp_path / "model")
    torch.testing.assert_close(draws(sd.load(tmp_path / "model")), draws(model), rtol=0, atol=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(draws(other), draws(model))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_carries_the_starts(name: str) -> None:
    make, data = MODELS[name]
    objective = trained(make, data)
    other = make()
    other.load_state_dict(objective.state_dict())
    assert torch.equal(draws(other.generator()), draws(objective.generator()))


@pytest.mark.parametrize("name", MODELS)
def test_resumed_run_samples_like_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    make, data = MODELS[name]
    whole = trained(make, data)
    torch.manual_seed(0)
    first = make()
    options: dict[str, Any] = {"batch_size": 20, "progress": False, "checkpoint": tmp_path / "run"}
    sd.fit(first, data, steps=6, **options)
    again = make()
    sd.fit(again, data, steps=6, resume=True, **options)
    assert torch.equal(draws(again.generator()), draws(whole.generator()))


@pytest.mark.parametrize("name", MODELS)
def test_precision_and_device_move_everything(name: str) -> None:
    make, data = MODELS[name]
    objective = trained(make, data)
    model = objective.generator().double()
    assert draws(model).dtype == torch.float64
    assert model.distribution(num_steps=3).sample((2,)).dtype == torch.float64
    assert model.log_prob(X1[:2].double(), num_steps=3).dtype == torch.float64
    moved = objective.to("meta").generator()
    assert all(v.is_meta for v in [*moved.parameters(), *moved.buffers()])


def test_networks_are_evaluated_in_evaluation_mode() -> None:
    class Dropping(FieldNetwork):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
            return nn.functional.dropout(super().forward(t, x, condition), 0.5, self.training)

    objective = InterpolantRegression(Interpolant("one-sided-linear"), velocity=Dropping(2, 8, 1))
    objective(X1)
    model = objective.generator()
    assert torch.equal(model.log_prob(X1[:4], num_steps=3), model.log_prob(X1[:4], num_steps=3))
    assert torch.equal(draws(model), draws(model))
    assert objective.fields.networks["velocity"].training
