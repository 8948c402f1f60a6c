"""What is saved and loaded samples and predicts as before; what can't be saved is named; no file runs code."""

from __future__ import annotations

import enum
import functools
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
import stochdyn.run.storage as storage_module
from stochdyn.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    InvalidInputError,
    UnavailableError,
)
from stochdyn.run import storable
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.identity import describe
from tests.bridges.laws import pushed
from tests.run.toys import Quadratic
from tests.test_laws import CASES, decay

ts = torch.linspace(0, 1, 6)


def loaded(thing: Any, folder: Path) -> Any:
    sd.save(thing, folder)
    return sd.load(folder)


@storable
def drift(t: Tensor, x: Tensor) -> Tensor:
    return x - x**3


@storable
class Square(sd.Objective):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2))

    def forward(self, batch: Any = None) -> sd.ObjectiveValue:
        return sd.ObjectiveValue(self.a.square().sum())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def snapshots() -> Any:
    g = generator()
    return sd.bridges.Snapshots([0.0, 1.0, 2.0], [torch.randn(30, 1, generator=g) + i for i in range(3)])


def sphere() -> Any:
    points = torch.randn(60, 3, generator=generator())
    return sd.vectorfields.PointCloud(points / points.norm(dim=1, keepdim=True))


def field() -> Any:
    cloud = sphere()
    normals = torch.as_tensor(cloud.array[:20], dtype=torch.float32)
    vectors = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]).expand(20, 3), normals)
    return sd.vectorfields.RVGP(cloud).fit(torch.arange(20), vectors)


def regression() -> Any:
    network = sd.interpolants.FieldNetwork
    torch.manual_seed(0)
    return sd.interpolants.InterpolantRegression(sd.interpolants.Interpolant(), velocity=network(1))


def video() -> Any:
    torch.manual_seed(0)
    networks = sd.fractional.VideoNetworks(2, 4, 4, (4, 4), (4,), 4)
    return sd.fractional.VideoModel(3, 16, networks=networks)


def _as_pixels(value: Tensor) -> bool:
    return value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)


LAW = Callable[[Any], Any]
THINGS: dict[str, tuple[Callable[[], Any], LAW]] = {
    "diffusion": (
        lambda: sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 0.5)),
        lambda law: law.sample(ts, 3, generator=1).x,
    ),
    "controlled diffusion": (
        lambda: sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 0.5)).controlled(drift),
        lambda law: law.sample(ts, 3, generator=1).x,
    ),
    "linear law": (
        lambda: sd.LinearGaussianMeasure(
            -torch.eye(1), torch.zeros(1), torch.eye(1), torch.zeros(1), torch.eye(1)
        ),
        lambda law: law.mean(ts),
    ),
    "video model": (
        video,
        lambda model: {n: (_as_pixels(p), p) for n, p in model.named_parameters()},
    ),
    "path": (
        lambda: sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 0.5)).sample(ts, 3, generator=1),
        lambda path: path.x,
    ),
    "plan": (
        lambda: sd.sinkhorn(*snapshots().samples[:2], 0.5),
        lambda plan: plan.plan(),
    ),
    "Lindbladian": (
        lambda: sd.povm.Lindbladian(2, [(1.0, "X", "all")], [(1.0, "sigma-", "all")]),
        lambda model: model.master_operator(sd.povm.Tetrahedral()).num_outcomes,
    ),
    "ansatz": (
        lambda: sd.povm.AutoregressiveTransformer(2, layers=1, width=8, heads=2),
        lambda net: net.sample(4, generator=generator())[0],
    ),
    "bridge": (
        lambda: sd.bridges.SchrodingerBridge(snapshots(), sd.bridges.LinearDrift(1), 0.5).solve(),
        lambda law: law.sample(torch.linspace(0, 2, 5), 3, generator=generator()).x,
    ),
    "fractional law": (
        lambda: sd.fractional.FractionalOU(1.0, 0.0, 1.0, 0.7),
        lambda law: law.covariance(ts),
    ),
    "point cloud": (sphere, lambda cloud: cloud.spectrum(5)[0]),
    "field": (field, lambda gp: gp.predict(torch.arange(5))[0]),
    "regression": (regression, lambda objective: objective.generator().push(torch.ones(2, 1), 10)),
    "result of fit": (lambda: sd.fit(Square(), steps=5, ema=0.9), lambda result: result.ema["a"]),
}


@pytest.mark.parametrize("kind", THINGS)
def test_what_is_loaded_does_as_before(tmp_path: Path, kind: str) -> None:
    make, use = THINGS[kind]
    thing = make()
    again = loaded(thing, tmp_path)
    assert type(again) is type(thing)
    torch.testing.assert_close(use(again), use(thing), rtol=0, atol=0)
    twice = loaded(again, tmp_path)
    torch.testing.assert_close(use(twice), use(thing), rtol=0, atol=0)


storable(decay)
storable(pushed)


@pytest.mark.parametrize("name", CASES)
def test_every_law_is_the_same_after_it_was_saved(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    law, grid = case.make(), torch.linspace(*case.ts, dtype=torch.float64)
    try:
        again = loaded(law, tmp_path)
    except UnavailableError as error:
        if "<locals>" not in str(error):
            raise
        pytest.skip("this example has a function without a name")
    for seed in (1, 2):
        expected = law.sample(grid, 3, generator=seed).x
        torch.testing.assert_close(again.sample(grid, 3, generator=seed).x, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_law_keeps_its_identity_while_it_is_used(name: str) -> None:
    case = CASES[name]
    law, grid = case.make(), torch.linspace(*case.ts, dtype=torch.float64)
    before = describe({"law": law})
    law.sample(grid, 3, generator=1)
    law.marginal(float(grid[-1])).sample(3, generator=1)
    assert describe({"law": law}) == before
    assert describe({"law": case.make()}) == before


@storable
class Colour(enum.Enum):
    RED = 1


@storable
class Pair(NamedTuple):
    left: Tensor
    right: int


@storable
@dataclass(frozen=True)
class Record:
    values: Tensor
    names: tuple[str, ...] = ("a",)


@storable
class Node:
    def __init__(self) -> None:
        self.me, self.count = self, 0

    @functools.cached_property
    def derived(self) -> int:
        self.count += 1
        return 7


@storable
class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@storable
class Rebuilt:
    def __init__(self, size: int) -> None:
        self.size, self.handle = size, open  # what it holds can't be saved

    def to_storage(self) -> dict[str, int]:
        return {"size": self.size}

    @classmethod
    def from_storage(cls, state: dict[str, int]) -> Rebuilt:
        return cls(state["size"])


PLAIN: list[Any] = [
    None, True, 3, 2.5, float("inf"), "text", b"bytes", 1 + 2j, [1, [2]], (1, (2,)), {1, 2}, frozenset({3}),
    {"#object": 3, 4: "x", (1, 2): None}, OrderedDict(a=1), Counter("aab"), deque([1, 2]), range(3), slice(1, 2),
    torch.float64, torch.Size([2, 3]), Colour.RED, torch.tanh, nn.functional.softplus, drift, Square, nn.Linear,
    nn.functional.leaky_relu,
]  # fmt: skip


@pytest.mark.parametrize("thing", PLAIN, ids=lambda v: str(v)[:20])
def test_plain_data_and_names(tmp_path: Path, thing: Any) -> None:
    again = loaded(thing, tmp_path)
    assert again == thing
    assert type(again) is type(thing)


def test_structure_is_kept(tmp_path: Path) -> None:
    shared = nn.Parameter(torch.ones(2))
    node = Node()
    assert node.derived == 7
    thing = {
        "shared": [shared, shared],
        "node": node,
        "pair": Pair(torch.zeros(1, dtype=torch.float64), 2),
        "record": Record(torch.eye(2).to_sparse()),
        "slots": Slotted(np.arange(3.0)),
        "rebuilt": Rebuilt(4),
        "many": defaultdict(list, {"a": [1]}),
        "complex": torch.tensor([1 + 2j]),
        "partial": functools.partial(torch.clamp, min=0.5),
        "method": Square().forward,
        "generator": generator(3),
        "wanted": torch.ones(1, requires_grad=True),
        "made": torch.ones(1, requires_grad=True) * 2,
    }
    again = loaded(thing, tmp_path)
    assert again["shared"][0] is again["shared"][1]
    assert isinstance(again["shared"][0], nn.Parameter)
    assert again["node"].me is again["node"]
    assert (again["node"].derived, again["node"].count) == (7, 2)
    assert again["pair"].left.dtype == torch.float64
    assert again["pair"].right == 2
    assert torch.equal(again["record"].values.to_dense(), torch.eye(2))
    assert again["slots"].value.tolist() == [0.0, 1.0, 2.0]
    assert again["rebuilt"].size == 4
    assert again["many"]["new"] == []
    assert torch.equal(again["complex"], thing["complex"])
    assert again["partial"](torch.zeros(1)) == 0.5
    assert again["method"]().loss == 2
    assert torch.equal(torch.rand(2, generator=again["generator"]), torch.rand(2, generator=generator(3)))
    assert again["wanted"].requires_grad
    assert not again["made"].requires_grad


Local = namedtuple("Local", ["a"])


class Unregistered:
    pass


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda: sd.SDE(lambda t, x: x, 0.3), r"SDE\.drift can't be saved; got the function .*<lambda>.*storable"),
        (lambda: {"x": [Unregistered()]}, r"dict\['x'\]\[0\] can't be saved; got an object of .*Unregistered"),
        (lambda: [open], r"list\[0\] can't be saved; got the function open"),
        (lambda: torch.zeros(2, device="meta"), "got a tensor without values"),
        (lambda: nn.LazyLinear(2), "got a tensor without values"),
        (lambda: sd.fit(Quadratic(torch.ones(1)), steps=1), r"FitResult\.objective can't be saved.*storable"),
    ],
    ids=["lambda", "class", "builtin", "meta", "lazy", "objective"],
)  # fmt: skip
def test_what_cannot_be_saved_is_named(tmp_path: Path, thing: Callable[[], Any], message: str) -> None:
    sd.save([1], tmp_path)
    with pytest.raises(UnavailableError, match=message):
        sd.save(thing(), tmp_path)
    assert sd.load(tmp_path) == [1]


def test_what_is_no_class_is_not_storable() -> None:
    for thing in (3, lambda: 1, functools.partial(print)):
        with pytest.raises(InvalidInputError, match="storable needs a class"):
            storable(thing)  # type: ignore[type-var]


class TestFiles:
    def test_nothing_there_and_something_else_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nothing to load"):
            sd.load(tmp_path)
        sd.fit(Square(), steps=1, checkpoint=tmp_path)
        with pytest.raises(ForeignCheckpointError, match="kind is fit instead of object"):
            sd.load(tmp_path)
        with pytest.raises(InvalidInputError, match="must be the path"):
            sd.save(1, 3)  # type: ignore[arg-type]

    def test_damage_is_refused(self, tmp_path: Path) -> None:
        sd.save([torch.ones(3)], tmp_path)
        for path in list(tmp_path.iterdir()):
            whole = path.read_bytes()
            path.write_bytes(whole[:-5])
            with pytest.raises(DamagedCheckpointError):
                sd.load(tmp_path)
            path.write_bytes(whole)

    def test_another_version_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(storage_module, "__version__", "99.1.0")
        sd.save([1], tmp_path)
        monkeypatch.undo()
        with pytest.raises(
            CheckpointError, match=r"another version.*99\.1\.0.*Load it with stochdyn 99\.1\.0"
        ):
            sd.load(tmp_path)

    def test_a_crash_leaves_the_previous_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import stochdyn.run.folder as folder_module

        sd.save([1], tmp_path)

        def crash(*args: Any) -> None:
            raise KeyboardInterrupt

        for call in ("fsync", "replace"):
            monkeypatch.setattr(folder_module.os, call, crash)
            with pytest.raises(KeyboardInterrupt):
                sd.save([2], tmp_path)
            monkeypatch.undo()
            assert sd.load(tmp_path) == [1]

    @pytest.mark.parametrize(
        ("root", "objects"),
        [
            ({"#function": "os:system"}, []),
            ({"#function": "torch:load"}, []),
            ({"#function": "torch:nn"}, []),
            ({"#function": "torch:__version__"}, []),
            ({"#class": "subprocess:Popen"}, []),
            ({"#object": 0}, [{"class": "subprocess:Popen", "holds": {}}]),
            ({"#object": 0}, [{"class": "stochdyn.run.storage:os.system", "holds": {}}]),
            ({"#object": 0}, [{"class": "stochdyn.run.storage:load", "holds": {}}]),
            ({"#object": 0}, [{"class": "stochdyn.core.law.path:PathSample"}]),
            ({"#object": 0}, [{"class": "torch.nn.modules.linear:Linear", "storage": 1}]),
            ({"#object": 7}, []),
            ({"#method": [{"#tensor": [0, False]}, "numpy"]}, []),
            ({"#get": []}, []),
            ({"#torch": "load"}, []),
            ({"#dtype": "load"}, []),
            ({"a": 1, "b": 2}, []),
            ({"#tensor": "x"}, []),
        ],
    )  # fmt: skip
    def test_no_file_runs_code(self, tmp_path: Path, root: Any, objects: list[Any]) -> None:
        state = {"library": sd.__version__, "root": root, "objects": objects, "tensors": [torch.ones(1)]}
        write_checkpoint(tmp_path, Checkpoint("object", 0, {}, state))
        with pytest.raises((DamagedCheckpointError, UnavailableError)):
            sd.load(tmp_path)

    def test_a_class_of_the_users_must_be_known_when_it_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sd.save(Square(), tmp_path)
        monkeypatch.delitem(storage_module._own, "tests.run.test_storage:Square")
        with pytest.raises(UnavailableError, match=r"isn't known here; got tests\.run\.test_storage:Square"):
            sd.load(tmp_path)

    def test_tensors_go_to_the_device_asked_for(self, tmp_path: Path) -> None:
        sd.save({"net": nn.Linear(2, 1), "where": torch.device("cpu")}, tmp_path)
        again = sd.load(tmp_path, device="meta")
        assert again["net"].weight.is_meta
        assert again["where"] == torch.device("meta")


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    sd.save(nn.Linear(2, 1), tmp_path)
    content = read_checkpoint(tmp_path)
    assert content is not None
    assert (content.kind, content.identity) == ("object", {"class": "torch.nn.modules.linear:Linear"})
