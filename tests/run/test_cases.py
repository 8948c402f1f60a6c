"""Programs of users that once went wrong, in today's words."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import stochdyn as sd


class Parabola(sd.Objective):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: Any = None) -> sd.ObjectiveValue:
        return sd.ObjectiveValue((self.a + torch.randn(())) ** 2)


@pytest.mark.parametrize("name", [".checkpoint.json.partial", ".checkpoint.json.probe"])
def test_a_link_with_the_name_of_a_temporary_file_is_not_written_through(tmp_path: Path, name: str) -> None:
    own, folder = tmp_path / "thesis.txt", tmp_path / "run"
    own.write_text("precious")
    for action in (
        lambda: sd.fit(Parabola(), steps=1, checkpoint=folder),
        lambda: sd.run.save_weights(torch.nn.Linear(2, 1), folder),
        lambda: sd.save(torch.nn.Linear(2, 1), folder),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.symlink(own, folder / name)
        action()
        assert own.read_text() == "precious"


def test_an_exception_of_a_callback_at_step_100_loses_nothing(tmp_path: Path) -> None:
    def bad(state: sd.run.FitState) -> None:
        if state.step == 100:
            raise KeyError("plotting failed")

    with pytest.raises(KeyError) as caught:
        sd.fit(Parabola(), steps=400, checkpoint=tmp_path, callbacks=[bad])
    assert caught.value.result.steps == 100  # type: ignore[attr-defined]
    assert sd.fit(Parabola(), steps=100, checkpoint=tmp_path, resume=True).steps == 100


def test_two_fits_in_two_threads_are_each_what_one_alone_is() -> None:
    def fit() -> torch.Tensor:
        return sd.fit(Parabola(), steps=200).losses

    alone, found = fit(), {}
    threads = [threading.Thread(target=lambda k=k: found.__setitem__(k, fit())) for k in (0, 1)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], alone) for k in (0, 1))
