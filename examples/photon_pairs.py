"""Pairs of photons: the state of their polarisations from sixteen published counts, its entanglement, and what the counts don't say.

    python examples/photon_pairs.py

Coincidences were counted behind sixteen settings of two polarisers, so the counts are those of one measurement with sixteen outcomes, in
the coordinates where its effects sum to one. It prints the state that linear inversion gives, which isn't one, the most likely state
with a certificate, and posterior intervals of purity and entanglement, and draws the state to ``outputs/photon_pairs.png``. The intervals are
of counting alone: settings of the plates that are off by a fraction of a degree aren't in them.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.diagnostics.figures import add_legend

mpl.use("Agg")
import matplotlib.pyplot as plt

C128 = torch.complex128
ROOT = 0.5**0.5
POLARISATIONS = {"H": [1, 0], "V": [0, 1], "D": [ROOT, ROOT], "R": [ROOT, -1j * ROOT], "L": [ROOT, 1j * ROOT]}


def projector(setting: str) -> Tensor:
    """Return the projector ``(4, 4)`` of a setting of two polarisers."""
    first, second = (torch.tensor(POLARISATIONS[letter], dtype=C128) for letter in setting)
    vector = torch.kron(first, second)
    return torch.outer(vector, vector.conj())


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(exponent)) @ vectors.mH


def concurrence(rho: Tensor) -> Tensor:
    """Return the concurrence of states ``(..., 4, 4)``: the square root of the tangle."""
    y = torch.tensor([[0, -1j], [1j, 0]], dtype=C128)
    flip = torch.kron(y, y)
    values = torch.linalg.eigvals(rho @ flip @ rho.conj() @ flip).real.clamp(min=0).sqrt().sort(-1).values
    return (2 * values[..., -1] - values.sum(-1)).clamp(min=0)


def main() -> None:
    """Invert, fit, draw states and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("outputs/photon_pairs.png"))
    arguments = parser.parse_args()

    table = sd.datasets.photon_pairs()
    counts = torch.tensor(list(table.values()))
    effects = torch.stack([projector(setting) for setting in table])

    # without regard to what a state is: sixteen equations for sixteen numbers
    matrix = effects.reshape(16, 16).conj()
    inverted = torch.linalg.solve(matrix, counts.to(C128)).reshape(4, 4)
    inverted = inverted / inverted.trace()
    print("eigenvalues by linear inversion", [round(v, 4) for v in torch.linalg.eigvalsh(inverted).tolist()])

    # The chance of a count is Tr ρ P / Tr ρ G with G = Σ P: a complete measurement of the state G^½ ρ G^½.
    total = effects.sum(0)
    inwards = power(total, -0.5)
    measurement = sd.povm.Measurement(inwards @ effects @ inwards, name="sixteen settings")
    records = torch.repeat_interleave(torch.arange(16), counts)[:, None]

    def pairs(state: Tensor) -> Tensor:
        rho = inwards @ state @ inwards
        return rho / rho.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]

    warnings.simplefilter("ignore", sd.errors.ConvergenceWarning)  # of the test of fit, which is printed
    best = sd.povm.tomography(records, measurement, progress=False)
    rho = pairs(best.state)
    print("eigenvalues of the most likely state", [round(v, 4) for v in torch.linalg.eigvalsh(rho).tolist()])
    print(f"no state is more likely by over {best.gap:.3f}; p of the counts {best.goodness.p_value:.1e}")
    expected = (measurement.probabilities(best.state) * counts.sum()).double()
    off = (counts - expected) / expected.sqrt()
    worst = int(off.abs().argmax())
    print(f"worst setting {list(table)[worst]}: {off[worst]:+.1f} standard deviations")

    found = sd.povm.tomography(
        records, measurement, method="posterior", num_draws=arguments.draws, warmup=150, progress=False
    )
    assert found.draws is not None
    draws = pairs(found.draws)
    bell = torch.tensor([ROOT, 0, 0, ROOT], dtype=C128)
    values = {
        "fidelity with (HH + VV)/√2": (bell.conj() @ draws @ bell).real,
        "purity": (draws @ draws).diagonal(dim1=-2, dim2=-1).sum(-1).real,
        "concurrence": concurrence(draws),
        "negativity": torch.stack([sd.povm.negativity(each, [0]) for each in draws]),
    }
    for name, value in values.items():
        print(f"{name:27s} {value.mean():.3f} ± {value.std():.3f}")
    print(f"largest fidelity with a maximally entangled state {largest(rho):.3f}")

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    names = ["HH", "HV", "VH", "VV"]
    for axis, part, title in zip(axes, (rho.real, rho.imag), ("real part", "imaginary part"), strict=False):
        image = axis.imshow(part, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        axis.set_xticks(range(4), names)
        axis.set_yticks(range(4), names)
        axis.set_title(f"most likely state, {title}", fontsize=10)
    figure.colorbar(image, ax=axes[:2], shrink=0.8)
    axes[2].hist(values["concurrence"], bins=25, color="#0072B2", label="concurrence")
    axes[2].hist(values["purity"], bins=25, color="#D55E00", label="purity")
    axes[2].set(xlabel="value", ylabel="posterior draws")
    add_legend(axes[2])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"wrote {arguments.out}")


def largest(rho: Tensor) -> float:
    """Return the largest overlap of a state with a maximally entangled one."""
    magic = torch.tensor(
        [
            [ROOT, 0, 0, ROOT],
            [-1j * ROOT, 0, 0, 1j * ROOT],
            [0, -1j * ROOT, -1j * ROOT, 0],
            [0, ROOT, -ROOT, 0],
        ],
        dtype=C128,
    )  # maximally entangled states have real coefficients in this basis
    return float(torch.linalg.eigvalsh((magic.conj() @ rho @ magic.mT).real)[-1])


if __name__ == "__main__":
    main()
