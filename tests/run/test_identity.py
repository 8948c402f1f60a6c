"""An identity is the same for the same things in any process, and another one for anything that changes an answer."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stochdyn.errors import ForeignCheckpointError
from stochdyn.run import digest, fit
from stochdyn.run.identity import CHANGES, Identity, describe
from tests.run.toys import Noisy, Regression, regression_data

scale = 2.0


@dataclass
class Settings:
    method: str = "heun"
    tolerance: float = 1e-6


class Law:
    def __init__(self, rate: Any) -> None:
        self._rate = rate
        self.same = self

    @functools.cached_property
    def derived(self) -> int:
        return 3


class Cached(nn.Module):
    _derived_ = ("_memo",)

    def __init__(self, value: int) -> None:
        super().__init__()
        self.value, self._memo = value, {}


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def scaled(x: float) -> float:
    return scale * x


def outer(a: float) -> Callable[[float], float]:
    return lambda x: a * x


def defaults(x: float, a: float = 1.0) -> float:
    return a * x


def calls(f: Any) -> Any:
    return lambda x: f(x)


class User(nn.Module):
    def __init__(self, power: int = 2, constant: float = 1.0) -> None:
        super().__init__()
        self.net, self.power = nn.Linear(2, 1), power
        self.register_buffer("constant", torch.tensor(constant))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) ** self.power


class OtherUser(User):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) ** self.power + 1


def complement(x: float) -> float:
    return 1 - x


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "numbers": (1, 2),
    "kinds": (1, "1"),
    "no value": (None, "None"),
    "text": ("a", "b"),
    "a bit of a tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "precision": (torch.zeros(2), torch.zeros(2).double()),
    "array": (np.arange(3), np.arange(3) + 1),
    "sparse": (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    "nesting": ([1, [2, 3]], [[1, 2], 3]),
    "order": ([1, 2], [2, 1]),
    "keys": ({"a": 1}, {"b": 1}),
    "dataclass": (Settings(), Settings("euler")),
    "private attributes": (Law(1.0), Law(2.0)),
    "slots": (Slotted(1), Slotted(2)),
    "closure": (outer(1.0), outer(2.0)),
    "constant": (lambda x: x + 1, lambda x: x + 2),
    "code": (lambda x: x + 1, lambda x: x * 1),
    "name of an attribute": (lambda x: x.sin(), lambda x: x.cos()),
    "global function": (lambda x: scaled(x), lambda x: complement(x)),
    "function in a closure": (calls(scaled), calls(complement)),
    "partial": (functools.partial(defaults, a=1.0), functools.partial(defaults, a=2.0)),
    "method of an object": (Law(1.0).__init__, Law(2.0).__init__),
    "library function": (torch.sin, torch.cos),
    "class of a user": (User, OtherUser),
    "class of a library": (nn.Tanh(), nn.ReLU()),
    "module's code": (User(), OtherUser()),
    "module's attribute": (User(2), User(3)),
    "module's buffer": (User(constant=1.0), User(constant=2.0)),
    "module's shape": (nn.Linear(2, 1), nn.Linear(2, 2)),
    "activation": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "frozen parameters": (
        nn.Linear(2, 1).requires_grad_(False),
        nn.Linear(2, 1).requires_grad_(False),
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_changes_an_answer_changes_the_digest(kind: str) -> None:
    a, b = DIFFERENT[kind]
    assert digest(a) != digest(b)
    assert digest(a) == digest(a)
    assert describe({"x": a}) != describe({"x": b})


SAME: dict[str, tuple[Any, Any]] = {
    "values of trainable parameters": (User(), User()),
    "order of keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "sets": ({"a", "b", "c"}, {"c", "b", "a"}),
    "memory": (torch.zeros(3, 2).T, torch.zeros(2, 3)),
    "the same object twice": ([torch.ones(2)] * 2, [torch.ones(2), torch.ones(2)]),
    "strides": (torch.ones(1).expand(3), torch.ones(3)),
    "stride of one number": (torch.ones(3)[:1].as_strided((1,), (0,)), torch.ones(1)),
    "gradient": (torch.ones(2, requires_grad=True), torch.ones(2)),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_does_not_change_it_does_not(kind: str) -> None:
    a, b = SAME[kind]
    assert digest(a) == digest(b)


def test_derived_values_do_not_count() -> None:
    law, cached = Law(1.0), Cached(1)
    before, described = (digest(law), digest(cached)), describe({"x": cached})
    assert law.derived == 3
    cached._memo["x"] = torch.ones(1)
    assert (digest(law), digest(cached)) == before
    assert describe({"x": cached}) == described
    assert digest(Cached(2)) != digest(cached)


def test_global_variables_that_a_function_reads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(scaled), digest(lambda x: scaled(x))
    monkeypatch.setattr(sys.modules[__name__], "scale", 3.0)
    assert digest(scaled) != before[0]
    assert digest(lambda x: scaled(x)) != before[1]


PROGRAM = """
from tests.run.test_identity import DIFFERENT, digest
print(digest({k: v for k, v in DIFFERENT.items() if k != "frozen parameters"}))
"""


def test_two_processes_agree() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            capture_output=True,
            text=True,
            check=True,
            env={**__import__("os").environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] != ""


def test_what_the_run_changes_is_left_out(tmp_path: Path) -> None:
    objective = Noisy()
    identity = Identity({"objective": objective, "seed": 0})
    objective.calls += 1
    saved = identity.now()
    assert saved["objective.calls"] == CHANGES
    for calls in (0, 1, 7):
        other = Noisy()
        other.calls.fill_(calls)
        Identity({"objective": other, "seed": 0}).check(tmp_path, saved)
    changed = Noisy()
    changed.net[2].p = 0.7
    other = Identity({"objective": changed, "seed": 0})
    with pytest.raises(ForeignCheckpointError, match=r"objective\.net\.2\.p is 0\.3 instead of 0\.7"):
        other.check(tmp_path, saved)


class Weighted(Regression):
    """Its loss has a function and a buffer of the user's."""

    def __init__(self, weight: Callable[[Tensor], Tensor] = torch.ones_like, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("offset", torch.tensor(offset))

    def forward(self, batch: Any = None) -> Any:
        x, y = batch
        return (self.weight(y) * (self.net(x) - y - self.offset).square()).mean()


def cosine(end: int) -> Callable[[Any], Any]:
    return lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, end)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": lambda: Weighted(lambda y: 1 + y.abs())}, "objective.weight is"),
        ({"objective": lambda: Weighted(offset=1.0)}, "objective.offset is"),
        ({"data": (regression_data()[0], regression_data()[1] + 1)}, r"data\.1 is"),
        (
            {"optimizer": functools.partial(torch.optim.Adam, weight_decay=0.5)},
            r"optimizer\.weight_decay is 0 instead of 0\.5",
        ),
        (
            {"optimizer": functools.partial(torch.optim.Adam, betas=(0.5, 0.9))},
            r"optimizer\.betas is \(0\.9, 0\.999\) instead",
        ),
        ({"scheduler": cosine(8)}, r"scheduler\.T_max is 4 instead of 8"),
        ({"accumulate": 2}, "accumulate is 1 instead of 2"),
        ({"precision": "bfloat16"}, "precision is None instead of bfloat16"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_fit_with_anything_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    def go(steps: int, **changes: Any) -> Any:
        settings = {"objective": Weighted, "data": regression_data(), "scheduler": cosine(4), **changes}
        return fit(settings.pop("objective")(), steps=steps, batch_size=4, checkpoint=tmp_path, **settings)

    go(4)
    with pytest.raises(ForeignCheckpointError, match=message):
        go(8, resume=True, **changes)
    go(8, resume=True)


def test_the_same_fit_goes_on_in_one_session_and_on_other_settings_of_speed(tmp_path: Path) -> None:
    objective = Noisy()
    settings: dict[str, Any] = {"data": regression_data(), "batch_size": 4, "checkpoint": tmp_path}
    fit(objective, steps=4, optimizer=functools.partial(torch.optim.Adam, fused=True), **settings)
    result = fit(objective, steps=8, resume=True, checkpoint_every=2, log_every=3, **settings)
    assert result.steps == 8
