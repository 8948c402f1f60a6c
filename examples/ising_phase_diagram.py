"""The steady state of the dissipative Ising chain over its transverse field, small chains exactly and longer ones.

Gauss-Newton steps drive the rates of change of all outcomes to zero. Each field starts from the state of the one
before, so a handful of steps suffices. Six sites are summed over all outcomes and stand beside the exact steady
states; the long chain is sampled, and stands beside converged values of ten sites where these are on file.

Run it from anywhere: ``python examples/ising_phase_diagram.py [--sites 16] [--samples 500] [--out DIR]``. It writes a
figure and prints the errors. The long chain takes an hour on one core; ``--quick`` leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

import stochdyn as sd
from stochdyn.povm import systems

OBSERVABLES = ["X", "Y", "Z"]
FIELDS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


def sweep(
    sites: int, strings: str | None, samples: int | None, fields: list[float], first: int, later: int
) -> list[sd.povm.SteadyState]:
    """Find the steady state for one field after the other."""
    povm = sd.povm.Tetrahedral()
    torch.manual_seed(0)
    net = sd.povm.AutoregressiveTransformer(sites, layers=1, width=16, heads=2, strings=strings).double()
    net.set_product_state(povm, "up")
    found = []
    for field in fields:
        model = systems.ising(sites, coupling=2.0, field=field, decay=1.0)
        steps = later if found else first
        # with few draws a short evolution comes first, which Gauss-Newton steps then refine
        method = "newton" if samples is None or found else "combined"
        found.append(
            sd.povm.steady_state(
                net, model, povm, method, samples, OBSERVABLES, iterations=steps, progress=False
            )
        )
        values = ", ".join(f"{k} {v:+.4f}" for k, v in found[-1].expect.items())
        line = f"{sites} sites, field {field:g}: {values}; residual {found[-1].residual:.1e}; {found[-1].seconds:.0f} s"
        known = reference(sites, field)
        if known is not None:
            worst = max(abs(found[-1].expect[k] - known[k]) for k in OBSERVABLES)
            line += f"; largest error {worst:.1e}"
        print(line, flush=True)
    return found


def reference(sites: int, field: float) -> dict[str, float] | None:
    """Return exact values: of this size, or converged ones of eight or ten sites."""
    for size in (sites, 10, 8) if sites >= 8 else (sites,):
        rows = sd.datasets.open_systems("steady", system="ising_ring", num_sites=size, field=field)
        if rows:
            return {k: float(rows[0].expect[k]) for k in OBSERVABLES}
    return None


def main() -> None:
    """Read the command line and draw the diagram."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=16, help="of the long chain")
    parser.add_argument("--samples", type=int, default=2000, help="for the long chain")
    parser.add_argument("--fields", type=float, nargs="+", default=FIELDS)
    parser.add_argument("--quick", action="store_true", help="only six sites")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the figure")
    options = parser.parse_args()
    matplotlib.use("Agg")
    options.out.mkdir(parents=True, exist_ok=True)
    fields = options.fields

    small = sweep(6, "translations+reflections", None, fields, 30, 20)
    exact = {k: [(reference(6, g) or {}).get(k, float("nan")) for g in fields] for k in OBSERVABLES}
    expect = {f"{k}, 6 sites": [s.expect[k] for s in small] for k in OBSERVABLES}
    lines = {f"{k}, 6 sites": exact[k] for k in OBSERVABLES}
    figure = sd.povm.plot_phase_diagram(fields, expect, exact=lines, xlabel="transverse field g / γ")
    if not options.quick:
        large = sweep(options.sites, None, options.samples, fields, 30, 12)
        for i, k in enumerate(OBSERVABLES):
            figure.axes[0].errorbar(
                fields,
                [s.expect[k] for s in large],
                [2 * s.stderr[k] for s in large],
                ls="none", marker="s", mfc="none", color=f"C{i}", label=f"{k}, {options.sites} sites",
            )  # fmt: skip
        figure.axes[0].legend()
    figure.savefig(options.out / "ising_phase_diagram.png", dpi=130)


if __name__ == "__main__":
    main()
