"""Hidden states of single molecules seen by energy transfer: rates, levels and intervals beside a discrete hidden Markov model.

    OMP_NUM_THREADS=1 python benchmarks/jumps/smfret.py --data FOLDER

FOLDER holds ``smfret_sim_k4.npz``: 150 simulated traces of ebFRET (MIT licence), 18 021 frames of donor and acceptor. Traces differ in
length; the efficiency of transfer is the acceptor's share of both. A jump process with a Gaussian level for each state is fitted by maximum
likelihood, rates per frame, and its intervals are those of the information at the maximum. hmmlearn's model, fitted to the same data in the
same run, has free transition probabilities, so that its likelihood may be larger only by what no jump process can do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from scipy.optimize import minimize
from sklearn.cluster import KMeans

from stochdyn.jumps import (
    GaussianLevels,
    JumpMeasure,
    RateMatrix,
    log_evidence,
    transition,
    transition_generator,
)

RESULTS = Path(__file__).parent / "results" / "smfret.json"
D = torch.float64


def read(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Return efficiencies ``(traces, longest)``, NaN past the end of a trace, and the lengths."""
    with np.load(folder / "smfret_sim_k4.npz") as file:
        trace, donor, acceptor = (file[k].astype(float) for k in ("trace", "donor", "acceptor"))
    _, lengths = np.unique(trace, return_counts=True)
    y = np.full((len(lengths), lengths.max()), np.nan)
    for row, part in zip(y, np.split(acceptor / (acceptor + donor), np.cumsum(lengths)[:-1]), strict=True):
        row[: len(part)] = part
    return torch.as_tensor(y), lengths.tolist()


class Model:
    """Log-likelihood of start, rates, levels and noise of K states."""

    def __init__(self, y: torch.Tensor, num_states: int) -> None:
        self.y, self.k = y, num_states
        self.times = torch.arange(y.shape[1], dtype=D)
        self.off = ~torch.eye(num_states, dtype=torch.bool)
        # levels are known to a thousandth and log rates to a third: a common unit helps the search
        self.unit = 0.02 * float(y[~y.isnan()].std())

    def parts(self, theta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return start ``(K,)``, generator ``(K, K)``, levels and scales ``(K,)`` of parameters."""
        k = self.k
        start, rates, levels, scales = theta.split([k, k * (k - 1), k, k])
        off = theta.new_zeros(k, k).masked_scatter(self.off, rates.exp())
        return start.softmax(0), off - torch.diag(off.sum(-1)), levels * self.unit, scales.exp()

    def cost(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the log-likelihood and its gradient."""
        theta = torch.tensor(flat).requires_grad_()
        start, q, levels, scales = self.parts(theta)
        # a weak prior keeps rates that never happen from running to zero, and counts for less than a nat in all
        value = -log_evidence(JumpMeasure(start, q), self.times, self.y, GaussianLevels(levels, scales)).sum()
        value = value + 0.5 * ((theta[self.k : self.k**2] + 4.0) / 10.0).square().sum()
        (slope,) = torch.autograd.grad(value, theta)
        return float(value.detach()), slope.numpy()

    def fit(self, restarts: int) -> tuple[torch.Tensor, float]:
        """Return the best of several maxima and minus its value."""
        seen = self.y[~self.y.isnan()]
        best: Any = None
        for seed in range(restarts):
            # levels start from clusters of all frames, as hmmlearn's do
            clusters = KMeans(self.k, n_init=1, random_state=seed).fit(seen.numpy()[:, None])
            levels = clusters.cluster_centers_[:, 0]
            k = self.k
            start = np.concatenate(
                [
                    np.zeros(k),
                    np.full(k * (k - 1), -4.0),
                    levels / self.unit,
                    np.full(k, np.log(float(seen.std()) / k)),
                ]
            )
            found = minimize(
                self.cost,
                start,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-3},
            )
            best = found if best is None or found.fun < best.fun else best
        return torch.as_tensor(best.x), float(best.fun)

    def spread(self, theta: torch.Tensor) -> torch.Tensor:
        """Return standard deviations of the parameters, from the information by differences of the gradient."""
        h = 1e-4
        rows = [
            (self.cost((theta + h * e).numpy())[1] - self.cost((theta - h * e).numpy())[1]) / (2 * h)
            for e in torch.eye(len(theta), dtype=D)
        ]
        matrix = torch.as_tensor(np.stack(rows))
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        return (vectors.square() / values.clamp(min=1e-4)).sum(-1).sqrt()


def ours(y: torch.Tensor, num_states: int, restarts: int) -> dict[str, Any]:
    """Fit the jump process."""
    begin = time.process_time()
    model = Model(y, num_states)
    theta, _ = model.fit(restarts)
    with torch.no_grad():
        start, q, levels, scales = model.parts(theta)
        value = float(
            log_evidence(JumpMeasure(start, q), model.times, y, GaussianLevels(levels, scales)).sum()
        )
    searched = time.process_time() - begin
    std = model.spread(theta)[num_states : num_states**2]
    order = levels.argsort()
    width = torch.zeros(num_states, num_states, dtype=D).masked_scatter(model.off, std)
    return {
        "log_likelihood": value,
        "seconds": searched,
        "levels": levels[order].tolist(),
        "rates": q[order][:, order].tolist(),
        "log_rate_std": width[order][:, order].tolist(),
        "dwell_frames": (-1.0 / q.diagonal())[order].tolist(),
        "relaxation_frames": RateMatrix(q).relaxation_times().tolist(),
        "smallest_probability": float(transition(q, 1.0).min()),
    }


def theirs(y: torch.Tensor, lengths: list[int], num_states: int, restarts: int) -> dict[str, Any] | None:
    """Fit hmmlearn's model, or return None where it isn't installed."""
    try:
        from hmmlearn.hmm import GaussianHMM
    except ImportError:
        return None
    flat = y[~y.isnan()].numpy()[:, None]
    begin = time.process_time()
    fits = [
        GaussianHMM(num_states, "diag", n_iter=100, random_state=k).fit(flat, lengths)
        for k in range(restarts)
    ]
    best = max(fits, key=lambda fit: fit.score(flat, lengths))
    out = {
        "log_likelihood": float(best.score(flat, lengths)),
        "seconds": time.process_time() - begin,
        "levels": np.sort(best.means_.ravel()).tolist(),
    }
    try:
        transition_generator(torch.as_tensor(best.transmat_), 1.0)
        out["jump_process"] = True
    except Exception as error:
        out["jump_process"], out["why"] = False, str(error).splitlines()[0]
    return out


def main() -> None:
    """Fit four and five states, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--states", type=int, nargs="*", default=[4, 5])
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    y, lengths = read(options.data)
    found: dict[str, Any] = {"frames": sum(lengths), "traces": len(lengths), "fits": {}}
    for k in options.states:
        found["fits"][str(k)] = {
            "stochdyn": ours(y, k, options.restarts),
            "hmmlearn": theirs(y, lengths, k, options.restarts),
        }
        found["machine"] = machine("scipy", "hmmlearn")
        print(json.dumps(found["fits"][str(k)]), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
