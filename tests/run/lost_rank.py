"""What each of two ranks does in the test of a rank that dies: ``python -m tests.run.lost_rank FOLDER [die]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stochdyn.run import FitState, fit
from tests.run.toys import Noisy, regression_data, weights


def main(folder: Path, die: bool) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])

    def end(state: FitState) -> None:
        if die and rank == 1 and state.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def go(checkpoint: Path | None) -> dict[str, torch.Tensor]:
        objective = Noisy()
        fit(
            objective, regression_data(), steps=12, batch_size=3, log_every=1, progress=False, callbacks=[end],
            checkpoint=checkpoint, checkpoint_every=4, resume=checkpoint is not None,
        )  # fmt: skip
        return weights(objective)

    for name, checkpoint in (("resumed", folder / "run"), ("straight", None)):
        save_file(go(checkpoint), folder / f"{name}{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "die" in sys.argv[2:])
