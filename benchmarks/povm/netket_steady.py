"""NetKet's neural density machine on the steady state of the Ising ring, as its documentation sets it up.

Run by an interpreter that has NetKet; ``run.py netket`` does so. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")


def solve(sites: int, field: float, iterations: int) -> dict[str, Any]:
    """Minimise the squared norm of the Liouvillian by stochastic reconfiguration."""
    import netket as nk
    import numpy as np

    graph = nk.graph.Chain(sites, pbc=True)
    hilbert = nk.hilbert.Spin(s=0.5, N=sites)
    h = nk.operator.LocalOperator(hilbert, dtype=complex)
    jumps = []
    for i in range(sites):
        h += 0.5 * field * nk.operator.spin.sigmax(hilbert, i)
        jumps.append(nk.operator.spin.sigmam(hilbert, i))
    for i, j in graph.edges():
        h += 0.5 * nk.operator.spin.sigmaz(hilbert, i) * nk.operator.spin.sigmaz(hilbert, j)
    liouvillian = nk.operator.LocalLiouvillian(h, jumps)
    model = nk.models.NDM(alpha=1, beta=1)
    sampler = nk.sampler.MetropolisLocal(liouvillian.hilbert, n_chains=16)
    on_diagonal = nk.sampler.MetropolisLocal(hilbert, n_chains=16)
    state = nk.vqs.MCMixedState(
        sampler, model, n_samples=2000, sampler_diag=on_diagonal, n_samples_diag=512, seed=1
    )
    driver = nk.driver.SteadyState(
        liouvillian,
        nk.optimizer.Sgd(learning_rate=0.01),
        variational_state=state,
        preconditioner=nk.optimizer.SR(diag_shift=0.01),
    )
    start = time.process_time()
    driver.run(1, show_progress=False)
    compiled = time.process_time()
    driver.run(iterations - 1, show_progress=False)
    end = time.process_time()
    rho = np.asarray(state.to_matrix())
    rho = rho / np.trace(rho)
    spins = {}
    for name, make in (
        ("X", nk.operator.spin.sigmax),
        ("Y", nk.operator.spin.sigmay),
        ("Z", nk.operator.spin.sigmaz),
    ):
        whole = sum(make(hilbert, i).to_dense() for i in range(sites)) / sites
        spins[name] = float(np.trace(rho @ whole).real)
    return {
        "sites": sites,
        "field": field,
        "iterations": iterations,
        "parameters": int(state.n_parameters),
        "compile_seconds": compiled - start,
        "seconds": end - compiled,
        "expect": spins,
    }


def main() -> None:
    """Read the command line, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--fields", type=float, nargs="*", default=[1.0, 2.0])
    options = parser.parse_args()
    import netket as nk

    rows = [solve(3 if options.smoke else 6, field, 3 if options.smoke else 300) for field in options.fields]
    print(json.dumps({"netket": nk.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
