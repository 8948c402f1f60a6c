"""Two gloo processes under torchrun are one process with the doubled batch, and fail and resume together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stochdyn.run import fit
from stochdyn.run.checkpoint import read_checkpoint
from stochdyn.run.distributed import World
from tests.run.toys import Regression, regression_data, weights


@dataclass
class Outcome:
    """What two ranks wrote and said."""

    folder: Path
    ranks: list[dict[str, Tensor]]
    said: list[list[str]]
    stderr: str

    def part(self, rank: int, name: str) -> dict[str, Tensor]:
        return {k.split("/", 1)[1]: v for k, v in self.ranks[rank].items() if k.startswith(name + "/")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", "tests.run.ranks", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=root, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [load_file(folder / f"rank{r}.safetensors") for r in (0, 1)]
    said = [(folder / f"said{r}.txt").read_text().split("\n") for r in (0, 1)]
    return Outcome(folder, ranks, said, done.stderr)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_parameters_losses_and_averages_are_equal_across_ranks(two_ranks: Outcome) -> None:
    assert_equal(two_ranks.part(0, "long"), two_ranks.part(1, "long"))
    for name in ("long_losses", "long_ema"):
        assert torch.equal(two_ranks.ranks[0][name], two_ranks.ranks[1][name])
    # Rank 1 started elsewhere; training is that of rank 0's start.
    alone = Regression()
    fit(alone, regression_data(), steps=12, lr=0.02, batch_size=8, progress=False)
    for name, value in weights(alone).items():
        torch.testing.assert_close(two_ranks.part(0, "long")[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_one_process_with_the_doubled_batch(two_ranks: Outcome) -> None:
    start = Regression(dtype=torch.float64)
    alone = Regression(dtype=torch.float64)
    data = regression_data(dtype=torch.float64)
    result = fit(alone, data, steps=1, lr=1.0, batch_size=10, optimizer=torch.optim.SGD, progress=False)
    for rank in (0, 1):
        moved = two_ranks.part(rank, "gradient")
        for name, value in weights(alone).items():
            torch.testing.assert_close(moved[name], value, rtol=1e-12, atol=1e-14)
            assert not torch.equal(value, weights(start)[name])
        # The reported loss is the mean over ranks, so also that of the doubled batch.
        torch.testing.assert_close(two_ranks.ranks[rank]["gradient_loss"], result.losses, rtol=1e-12, atol=0)


def test_particles_differ_by_rank_and_their_gradients_are_averaged(two_ranks: Outcome) -> None:
    first, second = (r["noise"] for r in two_ranks.ranks)
    assert not torch.equal(first, second)
    for rank in two_ranks.ranks:
        torch.testing.assert_close(rank["particle_step"], -(first + second) / 2)


def test_the_bound_of_pyro_is_trained_on_both_ranks(two_ranks: Outcome) -> None:
    assert_equal(two_ranks.part(0, "pyro"), two_ranks.part(1, "pyro"))
    # Conjugate: the posterior mean is sum(y) / (1/9 + 16) = 1.986, and one posterior deviation is 0.25.
    assert two_ranks.part(0, "pyro")["locs.mean_unconstrained"].item() == pytest.approx(
        32 / (1 / 9 + 16), abs=0.1
    )


def test_resumes_to_the_same_bits_on_every_rank(two_ranks: Outcome) -> None:
    for rank in (0, 1):
        assert_equal(two_ranks.part(rank, "resumed"), two_ranks.part(rank, "straight"))
        values = two_ranks.ranks[rank]
        assert torch.equal(values["resumed_losses"], values["straight_losses"])
        assert torch.equal(values["half_losses"], values["straight_losses"][:12])
    content = read_checkpoint(two_ranks.folder / "checkpoint")
    assert content is not None
    states = [rank["torch"] for rank in content.state["random"]]
    assert len(states) == 2
    assert not torch.equal(states[0], states[1])


def test_a_bad_loss_on_one_rank_stops_both_at_the_same_step(two_ranks: Outcome) -> None:
    assert two_ranks.said[1][0].startswith("NonFiniteLossError: the loss is not finite at step 5")
    assert two_ranks.said[0][0].startswith("NonFiniteLossError: the loss or a gradient on another rank")
    assert "at step 5" in two_ranks.said[0][0]
    assert_equal(two_ranks.part(0, "broken"), two_ranks.part(1, "broken"))


def test_a_full_disk_on_the_main_rank_stops_both(two_ranks: Outcome) -> None:
    assert two_ranks.said[0][1] == "CheckpointWriteError: full; got No space left on device"
    assert two_ranks.said[1][1].startswith(
        "CheckpointWriteError: the main process couldn't write the checkpoint"
    )


def test_a_stop_on_one_rank_is_agreed_on_at_the_next_look(two_ranks: Outcome) -> None:
    for rank in two_ranks.ranks:
        assert rank["stopped_at"].tolist() == [6, 1]
        # Looks every 3 steps: best at 3, misses at 6 and 9; ranks agree at the next multiple of 4.
        assert rank["early_at"].tolist() == [12, 1]


def test_only_the_main_rank_shows_a_bar(two_ranks: Outcome) -> None:
    assert two_ranks.stderr.count("| 0/12 [") == 1  # how every bar begins, once
    assert "12/12" in two_ranks.stderr


def test_distributed_false_trains_alone(two_ranks: Outcome) -> None:
    first, second = two_ranks.part(0, "alone"), two_ranks.part(1, "alone")
    assert not torch.equal(first["net.0.weight"], second["net.0.weight"])


def test_a_run_of_two_ranks_is_foreign_to_one(two_ranks: Outcome) -> None:
    from stochdyn.errors import ForeignCheckpointError
    from tests.run.toys import Noisy

    with pytest.raises(ForeignCheckpointError, match="number of ranks is 2 instead of 1"):
        fit(
            Noisy(),
            regression_data(),
            batch_size=3,
            progress=False,
            checkpoint=two_ranks.folder / "checkpoint",
            resume=True,
        )


def two_processes(folder: Path, *options: str) -> list[tuple[int, str]]:
    """Run ``lost_rank`` on two ranks without torchrun, which would end the one as soon as the other dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.run.lost_rank", str(folder), *options],
                env=environment, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=240)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def one_rank_died(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str]]]:
    folder = tmp_path_factory.mktemp("lost")
    return folder, two_processes(folder, "die")


def test_a_killed_rank_ends_the_other_with_a_clear_error_and_a_whole_checkpoint(
    one_rank_died: tuple[Path, list[tuple[int, str]]],
) -> None:
    folder, ((code, said), (killed, _)) = one_rank_died
    assert (code, killed) == (1, -signal.SIGKILL)
    assert "LostProcessError: another rank has died. See what it said, and start all of them again" in said
    assert f"fit stopped after step 7 of 12; the checkpoint {folder / 'run'} holds step 4" in said
    content = read_checkpoint(folder / "run")
    assert content is not None
    assert content.step == 4


@pytest.mark.slow
def test_both_ranks_go_on_from_it_to_the_same_bits(
    one_rank_died: tuple[Path, list[tuple[int, str]]],
) -> None:
    folder, _ = one_rank_died
    assert [code for code, _ in two_processes(folder)] == [0, 0]
    for rank in (0, 1):
        assert_equal(*(load_file(folder / f"{name}{rank}.safetensors") for name in ("resumed", "straight")))


def test_one_process_alone_is_a_world() -> None:
    world, x = World(), torch.ones(2)
    assert world.is_main
    assert world.mean(x) is x
    assert world.agree(3, torch.device("cpu")) == 3
    assert world.gather_bytes(b"abc", torch.device("cpu")) == [b"abc"]
