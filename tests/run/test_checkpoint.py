"""A checkpoint is whole or refused: damage, other models, full disks, and death in the middle of saving."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import stochdyn
import stochdyn.run.checkpoint as checkpoint_module
import stochdyn.run.folder as folder_module
from stochdyn.errors import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    InvalidInputError,
)
from stochdyn.run import FitResult, fit, load_weights, save_weights
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from tests.run.toys import Quadratic, Regression, regression_data, same_bits, weights

MANIFEST = "checkpoint.json"


def content(step: int, size: int = 6) -> Checkpoint:
    values = torch.arange(size) + 100.0 * step
    return Checkpoint(
        "weights", step, {"w": f"float32 ({size},)"}, {"objective": {"w": values}, "step": step}
    )


def stored_step(folder: Path) -> int:
    """Read a checkpoint and verify that it is one whole :func:`content`."""
    found = read_checkpoint(folder)
    assert found is not None
    values = found.state["objective"]["w"]
    assert torch.equal(values, torch.arange(len(values)) + 100.0 * found.step)
    assert found.state["step"] == found.step
    return found.step


def run(objective: nn.Module, folder: Path, steps: int = 4, **kwargs: Any) -> FitResult:
    settings = {"batch_size": 4, "progress": False, "checkpoint": folder, **kwargs}
    return fit(objective, regression_data(), steps=steps, **settings)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


class TestFormat:
    def test_one_manifest_and_one_tensor_file_both_open_formats(self, tmp_path: Path) -> None:
        objective = Regression()
        result = run(objective, tmp_path, steps=6, checkpoint_every=2, ema=0.9)
        manifest = json.loads((tmp_path / MANIFEST).read_text())
        name = manifest["tensors"]["file"]
        assert set(files(tmp_path)) == {MANIFEST, name}  # earlier saves and partial files are gone
        assert (manifest["step"], manifest["kind"], manifest["library"]) == (
            6,
            "fit",
            stochdyn.__version__,
        )
        assert manifest["identity"]["objective.net.0.weight"] == "float32 (8, 3)"
        tensors = safetensors.torch.load_file(tmp_path / name)
        assert torch.equal(tensors["state/job/objective/net.0.weight"], objective.net[0].weight)
        assert torch.equal(tensors["state/job/log/losses"], result.losses)
        assert result.ema is not None
        assert torch.equal(tensors["state/job/ema/values/net.0.bias"], result.ema["net.0.bias"])
        assert not any(b"pickle" in data or data[:1] == b"\x80" for data in files(tmp_path).values())

    def test_saving_twice_leaves_one_and_is_found_by_steps(self, tmp_path: Path) -> None:
        for step in (1, 2, 3):
            write_checkpoint(tmp_path / "new" / "folder", content(step))
            assert stored_step(tmp_path / "new" / "folder") == step
        assert len(files(tmp_path / "new" / "folder")) == 2

    def test_nothing_there_is_none(self, tmp_path: Path) -> None:
        assert read_checkpoint(tmp_path) is None
        assert read_checkpoint(tmp_path / "absent") is None

    def test_extra_state_of_modules_is_kept(self, tmp_path: Path) -> None:
        class Counting(Quadratic):
            calls = 0

            def forward(self, batch: Any = None) -> Any:
                self.calls += 1
                return super().forward()

            def get_extra_state(self) -> dict[str, int]:
                return {"calls": self.calls}

            def set_extra_state(self, state: dict[str, int]) -> None:
                self.calls = state["calls"]

        fit(Counting(torch.ones(1)), steps=3, progress=False, checkpoint=tmp_path)
        again = Counting(torch.ones(1))
        fit(again, steps=5, progress=False, checkpoint=tmp_path, resume=True)
        assert again.calls == 5


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x80\x04not what it was")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def test_what_is_read_while_another_saves_is_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, content(1))

    def save() -> None:
        for step in range(2, 60):
            write_checkpoint(tmp_path, content(step))

    writer = threading.Thread(target=save)
    writer.start()
    seen = [1]
    while writer.is_alive():
        seen.append(stored_step(tmp_path))
    writer.join()
    assert seen == sorted(seen)
    assert stored_step(tmp_path) == 59


class TestDamage:
    @pytest.mark.parametrize("damage", [_truncate, _flip_bit, _garbage, _empty, Path.unlink])
    @pytest.mark.parametrize("which", ["manifest", "tensors"])
    def test_is_refused_before_anything_changes(self, tmp_path: Path, which: str, damage: Any) -> None:
        run(Regression(), tmp_path)
        target = tmp_path / MANIFEST if which == "manifest" else next(tmp_path.glob("tensors-*"))
        damage(target)
        objective = Regression()
        before, on_disk = weights(objective), files(tmp_path)
        with pytest.raises(DamagedCheckpointError):
            run(objective, tmp_path, resume=True)
        with pytest.raises(DamagedCheckpointError):
            load_weights(tmp_path, objective)
        assert same_bits(weights(objective), before)
        assert files(tmp_path) == on_disk

    def test_any_bit_of_either_file_counts(self, tmp_path: Path) -> None:
        """Flips one bit at 60 places spread over each file; white space in JSON alone may change unseen."""
        write_checkpoint(tmp_path, content(1))
        for path in tmp_path.iterdir():
            data = path.read_bytes()
            for i in range(0, len(data), max(1, len(data) // 60)):
                changed = bytearray(data)
                changed[i] ^= 1
                path.write_bytes(changed)
                try:
                    assert stored_step(tmp_path) == 1
                    assert data[i : i + 1].isspace()
                except DamagedCheckpointError:
                    pass
            path.write_bytes(data)

    def test_messages_say_what_is_wrong(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, content(1))
        tensors = next(tmp_path.glob("tensors-*"))
        whole = tensors.read_bytes()
        tensors.write_bytes(whole[:50])
        with pytest.raises(DamagedCheckpointError, match=f"got 50 bytes; expected {len(whole)} bytes"):
            read_checkpoint(tmp_path)
        tensors.unlink()
        with pytest.raises(DamagedCheckpointError, match=f"lacks a file; got {tensors.name}"):
            read_checkpoint(tmp_path)
        (tmp_path / MANIFEST).write_text("{]")
        with pytest.raises(DamagedCheckpointError, match="isn't JSON"):
            read_checkpoint(tmp_path)
        (tmp_path / MANIFEST).write_text('{"format": "cake"}')
        with pytest.raises(DamagedCheckpointError, match="isn't the manifest of a checkpoint"):
            read_checkpoint(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(DamagedCheckpointError, match="a checkpoint is a directory"):
            read_checkpoint(tmp_path / "file")

    @pytest.mark.parametrize(("version", "age"), [(99, "a newer"), (1, "an older")])
    def test_another_format_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, age: str
    ) -> None:
        monkeypatch.setattr(checkpoint_module, "VERSION", version)
        monkeypatch.setattr(checkpoint_module, "__version__", "9.9")
        write_checkpoint(tmp_path, content(1))
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=rf"{age} stochdyn \(9\.9\).*format version {version}"):
            read_checkpoint(tmp_path)


class Wider(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Linear(8, 2)
        self.extra = nn.Parameter(torch.zeros(()))
        self.net[0].double()


class TestForeign:
    def test_another_model_is_refused_with_the_names_that_differ(self, tmp_path: Path) -> None:
        run(Regression(), tmp_path)
        objective = Wider()
        before = weights(objective)
        for attempt in (
            lambda: run(objective, tmp_path, resume=True),
            lambda: load_weights(tmp_path, objective),
        ):
            with pytest.raises(ForeignCheckpointError) as caught:
                attempt()
            message = str(caught.value)
            assert "extra is missing" in message
            assert "net.3.weight is float32 (1, 8) instead of float32 (2, 8)" in message
            assert "net.0.weight is float32 (8, 3) instead of float64 (8, 3)" in message
            assert "net.2" not in message
        assert same_bits(weights(objective), before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lr": 0.5}, "lr is 0.001 instead of 0.5"),
            ({"seed": 3}, "seed is 0 instead of 3"),
            ({"batch_size": 5}, "batch_size is 4 instead of 5"),
            ({"optimizer": torch.optim.SGD}, "optimizer is Adam instead of SGD"),
            ({"ema": 0.9}, "ema is None instead of 0.9"),
            ({"clip_norm": 1.0}, "clip_norm is None instead of 1.0"),
            (
                {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)},
                "scheduler is None instead of StepLR",
            ),
        ],
        ids=lambda v: v if isinstance(v, str) else None,
    )
    def test_another_setting_is_refused(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        run(Regression(), tmp_path)
        with pytest.raises(ForeignCheckpointError, match=message):
            run(Regression(), tmp_path, steps=8, resume=True, **changes)

    def test_another_data_size_is_refused(self, tmp_path: Path) -> None:
        run(Regression(), tmp_path)
        settings: dict[str, Any] = {"batch_size": 4, "progress": False, "checkpoint": tmp_path}
        with pytest.raises(
            ForeignCheckpointError, match=r"number of items is 20 instead of 30; data\.0 is float32 \(20, 3\)"
        ):
            fit(Regression(), regression_data(30), steps=9, resume=True, **settings)

    def test_bare_weights_are_no_run(self, tmp_path: Path) -> None:
        save_weights(Regression(), tmp_path)
        with pytest.raises(ForeignCheckpointError, match="kind is weights instead of fit"):
            run(Regression(), tmp_path, resume=True)


def _fail_write(monkeypatch: pytest.MonkeyPatch, call: int, action: Any) -> None:
    """Make the ``call``-th fsync run ``action`` instead; each save does tensors, folder, manifest, folder."""
    calls = [0]
    real = os.fsync

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            action()
        real(handle)

    monkeypatch.setattr(folder_module.os, "fsync", fsync)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFullDisk:
    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_the_previous_checkpoint_survives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        write_checkpoint(tmp_path, content(1))
        before = files(tmp_path)
        _fail_write(monkeypatch, call, _no_space)
        with pytest.raises(
            CheckpointWriteError, match=r"step 2 couldn't be written.*No space left.*untouched"
        ):
            write_checkpoint(tmp_path, content(2))
        monkeypatch.undo()
        assert stored_step(tmp_path) == 1
        assert files(tmp_path) == before  # nothing of the failed save takes up space
        write_checkpoint(tmp_path, content(3))  # with space again, what was left over goes away
        assert stored_step(tmp_path) == 3
        assert len(files(tmp_path)) == 2

    def test_a_run_that_meets_it_can_be_resumed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        straight = Regression()
        run(straight, tmp_path / "other", steps=9)
        # The first save has two more calls, for the note that a first save is under way.
        _fail_write(monkeypatch, 9, _no_space)
        with pytest.raises(CheckpointWriteError):
            run(Regression(), tmp_path, steps=9, checkpoint_every=3)
        monkeypatch.undo()
        found = read_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 3
        again = Regression()
        run(again, tmp_path, steps=9, resume=True)
        assert same_bits(weights(again), weights(straight))

    def test_a_limit_of_the_operating_system(self, tmp_path: Path) -> None:
        """A real refusal in the middle of a write: files may not grow beyond 4 kB."""
        write_checkpoint(tmp_path, content(1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(CheckpointWriteError, match="File too large"):
                write_checkpoint(tmp_path, content(2, size=100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert stored_step(tmp_path) == 1
        assert len(files(tmp_path)) == 2

    def test_where_no_folder_can_be_is_said_before_any_work(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        objective = Regression()
        before = weights(objective)
        with pytest.raises(CheckpointWriteError, match="can't be written to"):
            run(objective, tmp_path / "file")
        assert same_bits(weights(objective), before)

    def test_an_optimizer_that_cannot_be_written_is_refused_before_any_work(self, tmp_path: Path) -> None:
        class Odd(torch.optim.SGD):
            def __init__(self, params: Any, lr: float) -> None:
                super().__init__(params, lr=lr)
                self.param_groups[0]["rule"] = print

        objective = Regression()
        before = weights(objective)
        with pytest.raises(CheckpointError, match="state/optimizer/param_groups/0/rule can't be written"):
            run(objective, tmp_path, optimizer=Odd)
        assert same_bits(weights(objective), before)
        assert files(tmp_path) == {}


KILLED = """
import os, signal, sys
from tests.run.test_checkpoint import content, stored_step
from stochdyn.run.checkpoint import read_checkpoint, write_checkpoint
from pathlib import Path

def patch(name, call):
    real, calls = getattr(os, name), [0]
    def replacement(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, replacement)

root = Path(sys.argv[1])
for previous in (True, False):
    for name in ("fsync", "replace"):
        for call in range(1, 7):
            folder = root / f"{previous}-{name}-{call}"
            if previous:
                write_checkpoint(folder, content(1))
            child = os.fork()
            if child == 0:
                patch(name, call)
                write_checkpoint(folder, content(2))
                os._exit(7)
            killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
            found = read_checkpoint(folder)
            step = None if found is None else stored_step(folder)
            print(previous, name, call, killed, step, sep=",")
            write_checkpoint(folder, content(3))
            assert stored_step(folder) == 3 and len(list(folder.iterdir())) == 2
"""


def test_sigkill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A child is killed at every fsync and every rename; the parent then reads what is on the disk."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.split()]
    with_previous = {(n, int(c)): (killed, s) for p, n, c, killed, s in rows if p == "True"}
    # Kills before the rename of the manifest leave the old one (fsync 1 to 3, rename 1 and 2), later the new.
    for key in [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)]:
        assert with_previous[key] == ("True", "1"), key
    assert with_previous["fsync", 4] == ("True", "2")
    assert with_previous["fsync", 5] == ("False", "2")
    first_save = {(n, int(c)): (killed, s) for p, n, c, killed, s in rows if p == "False"}
    for key, (killed, step) in first_save.items():
        finished = killed == "False" or key == ("fsync", 6)
        assert step == ("2" if finished else "None"), key
    assert sum(killed == "True" for killed, _ in first_save.values()) == 9


class TestWeights:
    def test_round_trip_is_exact_and_keeps_the_device_and_grad(self, tmp_path: Path) -> None:
        a, b = Regression(), Wider()
        run(a, tmp_path / "run", ema=0.5)
        save_weights(a, tmp_path / "weights")
        for folder in ("run", "weights"):
            b = Regression()
            load_weights(tmp_path / folder, b)
            assert same_bits(weights(a), weights(b))
            assert all(p.requires_grad and p.is_leaf for p in b.parameters())

    def test_the_average_can_be_loaded_instead(self, tmp_path: Path) -> None:
        objective, other = Regression(), Regression()
        result = run(objective, tmp_path, ema=0.5)
        assert result.ema is not None
        load_weights(tmp_path, other, ema=True)
        assert same_bits(weights(other), {**weights(objective), **result.ema})
        assert same_bits(weights(result.ema_objective), weights(other))
        assert not same_bits(weights(other), weights(objective))

    def test_without_an_average_that_is_said(self, tmp_path: Path) -> None:
        result = run(Regression(), tmp_path)
        with pytest.raises(InvalidInputError, match="keeps no average"):
            load_weights(tmp_path, Regression(), ema=True)
        with pytest.raises(InvalidInputError, match="kept no average"):
            _ = result.ema_objective

    @pytest.mark.parametrize("kind", ["guide", "lazy"])
    def test_a_module_that_was_never_called_is_told_so(self, tmp_path: Path, kind: str) -> None:
        import pyro
        import pyro.distributions as dist
        from pyro.infer.autoguide import AutoNormal

        def model() -> None:
            pyro.sample("z", dist.Normal(0.0, 1.0))

        def make() -> Any:
            return AutoNormal(model) if kind == "guide" else nn.LazyLinear(2)

        def call(module: Any) -> None:
            module() if kind == "guide" else module(torch.ones(1, 3))

        first, second = make(), make()
        call(first)
        save_weights(first, tmp_path)
        with pytest.raises(ForeignCheckpointError, match=r"in its first call.*call it once before"):
            load_weights(tmp_path, second)
        call(second)
        load_weights(tmp_path, second)
        assert same_bits(weights(first), weights(second))

    def test_nothing_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no weights to load"):
            load_weights(tmp_path / "absent", Regression())

    def test_tied_and_complex_weights(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(2, 2)
                self.b = self.a
                self.c = nn.Parameter(torch.randn(2, dtype=torch.complex64))

            def forward(self) -> Tensor:
                return self.a.weight.sum()

        first, second = Tied(), Tied()
        save_weights(first, tmp_path)
        load_weights(tmp_path, second)
        assert same_bits(weights(first), weights(second))
        assert second.a.weight is second.b.weight
