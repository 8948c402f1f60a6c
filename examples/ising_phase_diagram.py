"""The steady state of the dissipative Ising chain over its transverse field, small chains exactly and longer ones.

Six sites: Gauss-Newton steps on a transformer drive the rates of change of all outcomes to zero, each field from the
state of the one before, beside the exact steady states. The long chain: a window ansatz relaxes by the variational
principle, by sampling, beside converged values of eight or ten sites.

Run it from anywhere: ``python examples/ising_phase_diagram.py [--sites 16] [--samples 2000] [--out DIR]``. It writes a
figure and prints the errors. Two minutes on one core; ``--quick`` leaves the long chain out.
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


def short(sites: int, fields: list[float]) -> list[sd.povm.SteadyState]:
    """Find the steady states of a short chain, summing over all outcomes."""
    povm = sd.povm.Tetrahedral()
    torch.manual_seed(0)
    net = sd.povm.AutoregressiveTransformer(sites, 1, 16, 2, "translations+reflections").double()
    net.set_product_state(povm, "up")
    found = []
    for field in fields:
        model = systems.ising(sites, coupling=2.0, field=field, decay=1.0)
        newton = sd.povm.Newton(max_iterations=20 if found else 30)
        state = sd.povm.steady_state(net, model, povm, newton, None, OBSERVABLES, progress=False)
        found.append(report(state, sites, field))
    return found


def long(sites: int, fields: list[float], samples: int) -> list[sd.povm.SteadyState]:
    """Let a long chain relax for one field after the other."""
    povm = sd.povm.Tetrahedral()
    net = sd.povm.AutoregressiveWindow(sites, order=2).double().set_product_state(povm, "up")
    found = []
    for field in fields:
        model = systems.ising(sites, coupling=2.0, field=field, decay=1.0)
        relax = sd.povm.Relaxation(horizon=12.0, evolution=sd.povm.TDVP(dt=0.1))
        state = sd.povm.steady_state(
            net, model, povm, relax, samples, OBSERVABLES, observe_samples=65536, progress=False
        )
        found.append(report(state, sites, field))
    return found


def report(state: sd.povm.SteadyState, sites: int, field: float) -> sd.povm.SteadyState:
    """Print what was found and how far it is from what is known."""
    values = ", ".join(f"{k} {v:+.4f}" for k, v in state.expect.items())
    line = f"{sites} sites, field {field:g}: {values}; residual {state.residual:.1e}; {state.seconds:.0f} s"
    known = reference(sites, field)
    if known is not None:
        worst = max(abs(state.expect[k] - known[k]) for k in OBSERVABLES)
        line += f"; largest error {worst:.1e}"
    print(line, flush=True)
    return state


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

    small = short(6, fields)
    exact = {k: [(reference(6, g) or {}).get(k, float("nan")) for g in fields] for k in OBSERVABLES}
    expect = {f"{k}, 6 sites": [s.expect[k] for s in small] for k in OBSERVABLES}
    lines = {f"{k}, 6 sites": exact[k] for k in OBSERVABLES}
    figure = sd.povm.plot_phase_diagram(fields, expect, exact=lines, xlabel="transverse field g / γ")
    if not options.quick:
        large = long(options.sites, fields, options.samples)
        for i, k in enumerate(OBSERVABLES):
            figure.axes[0].errorbar(
                fields,
                [s.expect[k] for s in large],
                [2 * s.stderr[k] for s in large],
                ls="none", marker="s", mfc="none", color=f"C{i}", label=f"{k}, {options.sites} sites",
            )  # fmt: skip
        figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(options.out / "ising_phase_diagram.png", dpi=130)


if __name__ == "__main__":
    main()
