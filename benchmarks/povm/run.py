"""Speed of the parts, and exact methods beside QuTiP, one JSON per section.

    OMP_NUM_THREADS=1 python benchmarks/povm/run.py sampling local window exact trajectories

Each section writes ``benchmarks/povm/results/speed/<section>.json``, from which ``table.py`` makes the table of the
documentation; times are processor seconds. ``--smoke`` runs everything on tiny sizes and writes nothing unless told to.
``netket`` needs ``--netket-python``, an interpreter that has NetKet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from measure import machine, race, seconds, source
from plain import plain_local_rate, sample_by_prefixes

from stochdyn.povm import (
    TDVP,
    AutoregressiveTransformer,
    AutoregressiveWindow,
    FourPauli,
    Lindbladian,
    Tetrahedral,
    evolve,
    exact,
    infer_parameters,
    observables,
    ring,
    simulate_records,
    systems,
)
from stochdyn.povm.dynamics import local_rates

RESULTS = Path(__file__).parent / "results" / "speed"
NETWORK = {"layers": 2, "width": 32, "heads": 4}


def network(sites: int, **options: Any) -> AutoregressiveTransformer:
    """Return an untrained network that isn't uniform, as in the middle of a run."""
    torch.manual_seed(0)
    net = AutoregressiveTransformer(sites, **NETWORK, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def sampling(smoke: bool) -> dict[str, Any]:
    """Sampling with keys and values kept, against running the prefix again for every site."""
    rows = []
    for sites, batch in [(6, 64)] if smoke else [(16, 4096), (32, 4096)]:
        net = network(sites)
        generator = torch.Generator().manual_seed(0)
        times = race(
            {
                "kept": lambda net=net, b=batch, g=generator: net.sample(b, generator=g),
                "again": lambda net=net, b=batch, g=generator: sample_by_prefixes(net, b, g),
            },
            1 if smoke else 3,
        )
        rows.append({"sites": sites, "batch": batch, **times, "ratio": times["again"] / times["kept"]})
        print(rows[-1], flush=True)
    return {"network": NETWORK, "dtype": "float32", "target": 5.0, "rows": rows}


def local(smoke: bool) -> dict[str, Any]:
    """The local estimator of the Ising ring, against a forward pass for all outcomes of every bond."""
    rows = []
    for sites, samples in [(6, 4)] if smoke else [(16, 128), (32, 32)]:
        for povm in (Tetrahedral(), Tetrahedral(rotated=False)):
            net = network(sites)
            a, _ = net.sample(samples, generator=torch.Generator().manual_seed(1))
            operator = systems.ising(sites).master_operator(povm, dtype=torch.float32)
            matrix = operator.matrix(0)

            def ours(net=net, operator=operator, a=a):
                with torch.no_grad():
                    return operator.local_rate(net.log_prob, a, deduplicate=False)

            def plain(net=net, matrix=matrix, a=a):
                return plain_local_rate(net, ring(a.shape[1]), matrix, a)

            difference = float((ours() - plain()).abs().max() / plain().abs().max())
            times = race({"ours": ours, "plain": plain}, 1 if smoke else 3)
            connected = float((operator.connected(a)[1] != 0).sum(1).double().mean())
            row = {
                "sites": sites,
                "samples": samples,
                "frame": povm.name,
                "connected": connected,
                "plain evaluations": 16 * sites,
                **times,
                "ratio": times["plain"] / times["ours"],
                "difference": difference,
            }
            rows.append(row)
            print(row, flush=True)
    return {"network": NETWORK, "dtype": "float32", "target": 2.0, "rows": rows}


def window(smoke: bool) -> dict[str, Any]:
    """Local rates of long rings by a window ansatz and by a transformer, and a whole step of evolution."""
    rows = []
    few, many = (4, 20) if smoke else (16, 4096)
    for sites in [6] if smoke else [16, 32, 64]:
        povm = Tetrahedral(rotated=False)
        operator = systems.ising(sites).master_operator(povm)
        deep, flat = network(sites).double(), AutoregressiveWindow(sites, order=2).double()
        flat.set_product_state(povm, "x+")
        a = flat.sample(many, generator=torch.Generator().manual_seed(1))[0]
        local_rates(flat, operator, a[:2])  # the plan is made once

        def by_window(net: Any = flat, operator: Any = operator, a: Any = a) -> Any:
            return local_rates(net, operator, a)

        def by_transformer(net: Any = deep, operator: Any = operator, a: Any = a[:few]) -> Any:
            return local_rates(net, operator, a)

        times = race({"window": by_window, "transformer": by_transformer}, 1 if smoke else 3)
        each = {"window": times["window"] / many, "transformer": times["transformer"] / few}

        def step(net: Any = flat, povm: Any = povm, many: int = many) -> Any:
            options = {"observables": ["Z"], "observe_samples": 16, "progress": False}
            model = systems.ising(net.num_sites)
            return evolve(net, model, povm, [0.0, 0.05], TDVP(dt=0.05), many, **options)

        row = {
            "sites": sites,
            "samples": many,
            **each,
            "ratio": each["transformer"] / each["window"],
            "step": min(seconds(step)[0] for _ in range(3)),
        }
        rows.append(row)
        print(row, flush=True)
    return {"network": NETWORK, "order": 2, "dtype": "float64", "rows": rows}


def exact_methods(smoke: bool) -> dict[str, Any]:
    """Exact evolution of the Ising ring to time 2 at eleven times: QuTiP, our matrix form, all outcome probabilities."""
    rows = []
    times = torch.linspace(0, 2, 11, dtype=torch.float64)
    tolerance = {"rtol": 1e-8, "atol": 1e-10}
    for sites in [3] if smoke else [4, 6, 7, 8, 9, 10]:
        model = systems.ising(sites)
        row: dict[str, Any] = {"sites": sites}
        answers = {}
        for backend in ("qutip", "matrix"):
            seconds(lambda b=backend: exact.evolve(systems.ising(2), "up", times[:2], ["Z"], backend=b))
            spent, run = seconds(
                lambda m=model, b=backend: exact.evolve(m, "up", times, ["X", "Z"], backend=b, **tolerance)
            )
            row[backend] = spent
            answers[backend] = run.expect["Z"]
        if sites <= 8:
            povm = Tetrahedral()
            row["outcomes"], p = seconds(lambda m=model, f=povm: exact.propagate(m, f, "up", times))
            answers["outcomes"] = observables(["Z"], sites)["Z"].mean(povm, p)
        row["largest difference"] = max(float((v - answers["matrix"]).abs().max()) for v in answers.values())
        rows.append(row)
        print(row, flush=True)
    return {"system": "ising_ring, coupling 2, field 1, from up to time 2", **tolerance, "rows": rows}


def trajectories(smoke: bool) -> dict[str, Any]:
    """A hundred quantum trajectories by QuTiP, the cheapest exact rival beyond ten sites; its error is that of sampling."""
    import qutip

    from stochdyn.povm.lindblad import to_qutip

    rows = []
    options = {"progress_bar": "", "map": "serial"}
    for sites in [3] if smoke else [8, 10, 12]:
        model = systems.ising(sites)
        h, collapse = to_qutip(model)
        start = qutip.tensor([qutip.basis(2, 0)] * sites)
        dims = [[2] * sites, [2] * sites]
        z = qutip.Qobj(sum_of_z(sites), dims=dims)
        times = torch.linspace(0, 2, 11).tolist()
        spent, run = seconds(
            lambda h=h, s=start, t=times, c=collapse, z=z: qutip.mcsolve(
                h, s, t, c, e_ops=[z], ntraj=100, options=options
            )
        )
        deviation = float(max(run.std_expect[0]) / 10)
        rows.append({"sites": sites, "seconds": spent, "standard error of Z": deviation})
        print(rows[-1], flush=True)
    return {"trajectories": 100, "rows": rows}


def sum_of_z(sites: int) -> Any:
    """The mean of Z over sites, as a sparse matrix."""
    from stochdyn.povm import named_operator
    from stochdyn.povm.master import full_operator

    return sum(full_operator(named_operator("Z"), (i,), sites, 2) for i in range(sites)) / sites


def estimators(smoke: bool) -> dict[str, Any]:
    """Variance of a Pauli string's estimator and size of the master equation's rows, by frame."""
    rows = []
    sites = 3 if smoke else 6
    for povm in (Tetrahedral(), Tetrahedral(rotated=False), FourPauli()):
        row: dict[str, Any] = {"frame": povm.name, "condition number": povm.condition_number}
        mixed = torch.full((povm.num_outcomes,), 1.0, dtype=torch.float64)
        mixed = povm.probabilities("mixed") * mixed
        row["variance of Z"] = float(mixed @ povm.coefficients("Z").square())
        for name, model in (
            ("Ising", systems.ising(sites)),
            ("XYZ", systems.xyz(sites, 2.0, 0.0, 1.0, field=1.0)),
            ("dephasing Ising", systems.dephasing_ising(sites, 1.0, 3.0, dephasing=1.0)),
        ):
            operator = model.master_operator(povm)
            rates = operator.connected(operator.configurations())[1]
            row[f"connected a site, {name}"] = (float((rates != 0).sum(1).double().mean()) - 1) / sites
            row[f"largest row sum, {name}"] = float(rates.abs().sum(1).max())
        rows.append(row)
        print(row, flush=True)
    return {"sites": sites, "rows": rows}


def inference(smoke: bool) -> dict[str, Any]:
    """Field and decay of two sites from 5000 records at five times, for several data sets."""
    import pyro.distributions as dist

    truth = {"field": 1.2, "decay": 0.8}
    model = Lindbladian(2, [("0.5*field", "X", "all"), (0.5, "ZZ", (0, 1))], [("decay", "sigma-", "all")])
    priors = {name: dist.LogNormal(torch.tensor(0.0, dtype=torch.float64), 1.0) for name in truth}
    povm, times = Tetrahedral(), [0.4, 0.8, 1.2, 1.6, 2.0]
    cases = [("svi", 0)] if smoke else [*(("svi", seed) for seed in range(16)), ("nuts", 2)]
    rows = []
    for method, seed in cases:
        generator = torch.Generator().manual_seed(seed)
        count = 50 if smoke else 1000
        records = simulate_records(model.bind(**truth), povm, "up", times, count, generator=generator)
        options: dict[str, Any] = {"steps": 10} if smoke else {}
        if method == "nuts":
            options = {"num_draws": 400, "warmup": 200}

        def run(records: Any = records, method: str = method, options: Any = options) -> Any:
            return infer_parameters(records, model, povm, "up", priors, method=method, **options)

        spent, idata = seconds(run)
        row: dict[str, Any] = {"method": method, "seed": seed, "records": len(records), "seconds": spent}
        row["khat"] = idata.attrs.get("khat")
        for name, value in truth.items():
            draws = torch.tensor(idata.posterior[name].values).flatten()
            low, high = torch.quantile(draws, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
            row[name] = {"mean": float(draws.mean()), "low": low, "high": high, "inside": low < value < high}
        rows.append(row)
        print(row, flush=True)
    return {"truth": truth, "times": times, "rows": rows}


def netket(python: Path | None, smoke: bool) -> dict[str, Any]:
    """NetKet's density-matrix machine on the steady state, run by an interpreter of its own."""
    if python is None:
        raise SystemExit("netket needs --netket-python")
    script = Path(__file__).parent / "netket_steady.py"
    command = [str(python), str(script), *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    for row in result["rows"]:
        right = exact.steady_state(systems.ising(row["sites"], field=row["field"]), ["X", "Y", "Z"]).expect
        row["largest error"] = max(abs(row["expect"][name] - float(right[name])) for name in "XYZ")
        print(row, flush=True)
    return result


SECTIONS = {
    "sampling": sampling,
    "local": local,
    "window": window,
    "exact": exact_methods,
    "trajectories": trajectories,
    "estimators": estimators,
    "inference": inference,
}


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}, netket; all but netket if none")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--netket-python", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = options.out or (None if options.smoke else RESULTS)
    for name in options.sections or SECTIONS:
        print(f"# {name}", flush=True)
        if name == "netket":
            result = netket(options.netket_python, options.smoke)
        else:
            result = SECTIONS[name](options.smoke)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            report = {"section": name, **result, "source": source(__file__), "machine": machine("qutip")}
            (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
