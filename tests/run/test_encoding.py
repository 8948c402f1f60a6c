"""Encoded state comes back equal, through JSON, whatever it is made of; functions are refused."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochdyn.errors import CheckpointError, DamagedCheckpointError, InvalidInputError
from stochdyn.run.ema import ParameterAverage
from stochdyn.run.encoding import decode, encode, pack, unpack
from stochdyn.run.randomness import global_state, set_global_state

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from(["$tuple", "$pairs"])
)
keys = st.text() | st.integers() | st.sampled_from(["$tensor", "$float"]) | st.tuples(st.integers())
trees = st.recursive(
    leaves,
    lambda t: (
        st.lists(t, max_size=4)
        | st.tuples(t, t)
        | st.dictionaries(keys, t, max_size=4)
        | st.builds(lambda v: (v,), t)
    ),
    max_leaves=12,
)


def types(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: types(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [types(v) for v in tree]
    return type(tree)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_comes_back(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    back = decode(json.loads(json.dumps(encode(tree, "t", tensors), allow_nan=False)), tensors)
    assert back == tree
    assert types(back) == types(tree)
    assert not tensors


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.randn(3, 2, dtype=torch.float64).T,
        torch.arange(4)[::2],
        torch.tensor([True, False]),
        torch.randn(2, dtype=torch.complex64),
        torch.randn(2, dtype=torch.complex128).conj(),
        torch.tensor([1, 255], dtype=torch.uint8),
        torch.randn(3).bfloat16(),
    ],
    ids=lambda t: f"{t.dtype} {tuple(t.shape)}",
)
def test_tensors_come_back_bit_for_bit(tensor: torch.Tensor) -> None:
    tree = {"a": [tensor, (tensor,)], 3: tensor, "3": tensor}
    back = unpack(pack(tree))
    for copy in (back["a"][0], back["a"][1][0], back[3], back["3"]):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_special_numbers_and_counters() -> None:
    tree = {
        "c": Counter({2: 1, 5: 3}),
        "f": [float("inf"), -float("inf"), float("nan")],
        "n": np.float64(0.1),
    }
    back = unpack(pack(tree))
    assert back["c"] == tree["c"]
    assert isinstance(back["c"], Counter)
    assert back["f"][:2] == [math.inf, -math.inf]
    assert math.isnan(back["f"][2])
    assert back["n"] == 0.1


def test_a_function_is_refused_by_its_place() -> None:
    with pytest.raises(
        CheckpointError, match=r"state/scheduler/0 can't be written to a checkpoint; got function"
    ):
        encode({"scheduler": [lambda x: x]}, "state", {})


def test_a_missing_tensor_is_damage() -> None:
    with pytest.raises(DamagedCheckpointError, match="lacks a tensor that it names; got gone"):
        decode({"x": {"$tensor": "gone"}}, {})


def test_random_state_survives_encoding() -> None:
    random.gauss(0, 1), np.random.randn(1)  # both now hold a second Gaussian in store
    state = unpack(pack(global_state()))

    def draw() -> tuple[Any, ...]:
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.randn(),
            np.random.rand(),
            torch.randn(3).tolist(),
        )

    expected = draw()
    draw()
    set_global_state(state)
    assert draw() == expected


def test_average_follows_its_recursion() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    average = ParameterAverage({"p": p}, decay=0.5)
    expected = 0.0
    for n in range(1, 30):
        p.data.fill_(float(n))
        average.update({"p": p})
        beta = min(0.5, (1 + n) / (10 + n))
        expected = beta * expected + (1 - beta) * n
        assert average.values["p"].tolist() == pytest.approx([expected, expected], rel=1e-12)
    assert p.requires_grad
    assert not average.values["p"].requires_grad


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_average_needs_a_decay_inside_the_unit_interval(decay: float) -> None:
    with pytest.raises(InvalidInputError, match=r"ema must be (greater|less|finite)"):
        ParameterAverage({}, decay)
