"""Turn the JSON files of this folder into the tables of the documentation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _calibration import LEVELS, coverage_table, summary
from _common import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "fractional_benchmarks.md"


def bridge(report: dict[str, Any]) -> list[str]:
    """Table of the bridge experiment."""
    lines = [
        "**Bridge.** $X_0=0$, $dX=-\\theta X\\,dt+dB^H$, $X_2=0$ observed with standard deviation 0.1, 200 steps. Worst relative error of the "
        "posterior's standard deviation at t = 0.5, 1, 1.5, and bound less evidence (nats), both against exact unit fractional Brownian "
        "motion. The last columns are the published setting (five states from 0.05 to 20, unnormalised type I, shared "
        "diffusion), as in the code published with the paper, whose figures may come from another version; at the "
        "optimum of its family (`bridge.py`).",
        "",
    ]
    rows = []
    by = {(r["theta"], r["hurst"], r["kind"]): r for r in report["rows"]}
    for theta, hurst in sorted({(t, h) for t, h, _ in by}):
        one, two = by[theta, hurst, "I"], by[theta, hurst, "II"]
        error = "worst relative error of std"
        rows.append([
            f"{theta:g}", hurst, f"{100 * two[error]:.1f} %", f"{two['elbo less evidence']:+.3f}", f"{100 * one[error]:.1f} %",
            f"{one['elbo less evidence']:+.3f}", f"{100 * one['published setting ' + error]:.0f} %",
            f"{one['published setting elbo'] - one['exact evidence']:+.2f}",
        ])  # fmt: skip
    return lines + markdown_table([["θ", "H", "type II", "", "type I", "", "published setting", ""], *rows])


def hurst(report: dict[str, Any]) -> list[str]:
    """Table of the recovery of the Hurst index."""
    rows = [
        [
            c["n"], c["hurst"], c["states"], len(c["fits"]), f"{c['rmse']:.4f}", f"{c['cramer_rao']:.4f}", f"{c['ratio']:.2f}",
            f"{100 * c['coverage of 90 % intervals']:.0f} %", f"{sum(f['seconds'] for f in c['fits']) / len(c['fits']):.0f}",
        ]
        for c in sorted(report["cells"], key=lambda c: (c["n"], c["hurst"]))
    ]  # fmt: skip
    head = [
        "n",
        "H",
        "memory states",
        "series",
        "RMSE",
        "Cramér–Rao bound",
        "ratio",
        "coverage of 90 % intervals",
        "processor seconds per fit",
    ]
    note = (
        "The bound knows no prior; the fits have log-normal ones of width 1 for rate and scale, half a width off the true "
        "values, and a flat one for H, which is why errors can be smaller than the bound. The error of a few series is itself "
        "known only roughly."
    )
    title = (
        "**Hurst index** of noisy fractional Ornstein–Uhlenbeck series, rate and scale unknown, by inference of the path "
        "(`hurst_recovery.py`)."
    )
    return [title, "", *markdown_table([head, *rows]), note, ""]


def calibration(report: dict[str, Any]) -> list[str]:
    """Table of coverage over data sets whose parameters are drawn from the prior."""
    said = {
        "series_100": "`infer_hurst`, n = 100",
        "series_1000": "`infer_hurst`, n = 1000",
        "gaps": "`infer_hurst`, n = 100, a tenth missing",
        "several": "`infer_hurst`, ten series of 12",
        "tracks": "`infer_roughness`, 30 tracks of 20 to 60 points in the plane, errors unknown",
        "roughness": "`infer_roughness`, 200 points, errors unknown",
        "fou": "`infer_fou`, 60 values, errors unknown",
        "latent": "`fit_posterior` of a latent equation, 40 values",
        "latent_exact": "the same, exact posterior by quadrature",
    }
    return [
        "**Calibration**: how many intervals cover the truth, over data sets whose parameters are drawn from the prior, and by how many "
        "binomial errors that is off (`calibration.py`). Rows of few data sets say little.",
        "",
        *coverage_table(report, said, "inference"),
        *_against_quadrature(report),
    ]


def _against_quadrature(report: dict[str, Any]) -> list[str]:
    """Say how far the ranks of the latent equation are from those of its exact posterior on the same data sets."""
    pairs = list(zip(report["latent"]["rows"], report["latent_exact"]["rows"], strict=False))
    gaps = [abs(mine[name] - exact[name]) for mine, exact in pairs for name in exact]
    covered = [
        "/".join(f"{100 * summary([pair[k] for pair in pairs], 'hurst')[f'{p:.0%}']:.0f}" for p in LEVELS)
        for k in (0, 1)
    ]
    return [
        f"On {len(pairs)} of these data sets, ranks by `fit_posterior` are {sum(gaps) / len(gaps):.3f} off those of the exact "
        f"posterior on average and {max(gaps):.3f} at most, where a thousand draws alone make about 0.01. Intervals of the index cover "
        f"{covered[0]} % there, those of the exact posterior {covered[1]} %.",
        "",
    ]


def double_well(report: dict[str, Any]) -> list[str]:
    """Table of the double well."""
    rows = []
    for row in report["rows"]:
        self_check = row["smoother against itself"]
        rows.append([
            row["hurst"], f"smoother, {row['runs'] // 2} runs of {row['particles']:.0e} particles, twice",
            f"{row['evidence'][0]:.2f}, {row['evidence'][1]:.2f}", "",
            f"{self_check['mean error of the mean, in posterior sd']:.3f}", f"{100 * self_check['mean relative error of the sd']:.1f} %",
            f"{row['seconds of the smoother']:.0f}",
        ])  # fmt: skip
        for fit in row["posteriors"]:
            for name, part in (
                (fit["posterior"], fit),
                (fit["posterior"] + ", weighted", fit["after importance weighting"]),
            ):
                rows.append([
                    row["hurst"], name, f"{fit['importance-weighted evidence']:.2f}" if part is not fit else "",
                    f"{fit['elbo']:.2f}" if part is fit else "", f"{part['mean error of the mean, in posterior sd']:.3f}",
                    f"{100 * part['mean relative error of the sd']:.1f} %", f"{fit['seconds']:.0f}" if part is fit else "",
                ])  # fmt: skip
    head = [
        "H",
        "law",
        "log evidence",
        "bound",
        "error of the mean (posterior sd)",
        "error of the sd",
        "processor seconds",
    ]
    return [
        "**Double well** with fractional noise against a particle smoother (`double_well.py`).",
        "",
        *markdown_table([head, *rows]),
        "",
        "Errors are against all runs of the smoother, pooled by their evidence; the rows of the smoother compare its two halves. "
        + _single_runs(report),
        "",
    ]


def _single_runs(report: dict[str, Any]) -> str:
    """Say how far single runs are apart."""
    parts = [
        f"{100 * row['two single runs']['mean relative error of the sd']:.0f} % at H = {row['hurst']}" for row in report["rows"]
    ]  # fmt: skip
    return f"Standard deviations of two single runs differ by {' and '.join(parts)}."


def rough_bergomi(report: dict[str, Any]) -> list[str]:
    """Table of the prices of calls."""
    rows = []
    for row in report["rows"]:
        hurst, eta, rho, xi = row["model"]
        for strike, mine, error, other, theirs in zip(
            row["strikes"], *row["library"], *row["conditional"], strict=True
        ):
            z = (mine - other) / (error**2 + theirs**2) ** 0.5
            rows.append([
                f"H = {hurst}, η = {eta}, ρ = {rho}, ξ = {xi**0.5:.3f}²", row["steps"], strike,
                f"{mine:.5f} ± {error:.5f}", f"{other:.5f} ± {theirs:.5f}", f"{z:+.1f}",
            ])  # fmt: skip
    head = [
        "model",
        "steps",
        "strike",
        "`rough_volatility`",
        "other computation",
        "difference in standard errors",
    ]
    return [
        f"**Calls under rough Bergomi**, one year, spot 1, {report['rows'][0]['paths']} paths each. The other computation draws paths from "
        "their exact joint covariance and takes Black's formula given the variance, on the same grid (`rough_bergomi.py`).",
        "",
        *markdown_table([head, *rows]),
    ]


def attractors(report: dict[str, Any]) -> list[str]:
    """Table of reconstructed attractors."""
    names = {
        "lorenz63": "Lorenz-63",
        "rossler": "Rössler",
        "lorenz96": "Lorenz-96, ten places",
        "lorenz63 without z": "Lorenz-63, z never read",
    }
    methods = {
        "truth": "another path of the true system",
        "latent": "`LatentSDE`",
        "linear": "linear modes (`SpectralDrift`)",
        "persistence": "persistence",
    }
    rows = []
    for key, name in names.items():
        for method, label in methods.items():
            found = report["systems"].get(key, {}).get(method)
            if found is not None:
                error = found["error after 5 readings"]
                rows.append([
                    name, label, f"{found['state space divergence']:.2f}", f"{found['power spectrum distance']:.3f}",
                    "" if method == "truth" else f"{error:.2f}", "" if method == "truth" else f"{found['seconds']:.0f}",
                ])  # fmt: skip
    head = [
        "system", "what runs freely", "state space divergence, nats", "distance of power spectra", "error after 5 readings",
        "processor seconds",
    ]  # fmt: skip
    return [
        "**Chaotic attractors** from 200 stretches of 50 readings, half of them missing, with errors of a tenth of a standard deviation; "
        "then 20 paths of 1000 readings' length that run freely from stretches not seen before. The divergence of visited states is in "
        "30 bins per component, for Lorenz-96 by kernels of one standard deviation; spectra are smoothed over 5 frequencies; errors are in "
        f"standard deviations. {report['steps']} steps of training, one seed (`attractors.py`).",
        "",
        *markdown_table([head, *rows]),
    ]


def video(report: dict[str, Any]) -> list[str]:
    """Table of the video model."""
    names = [
        "psnr reconstruction",
        "psnr prediction, best sample",
        "psnr prediction, one sample",
        "psnr prediction, mean frame",
    ]
    rows = [
        [r["noise"], r["steps"], f"{r['processor minutes']:.0f}", f"{r['elbo']:.0f}", f"{r['kl']:.0f}",
         *(f"{r[name]:.2f}" for name in names), "" if r["hurst"] is None else f"{r['hurst']:.2f}"]
        for r in report["rows"]
    ]  # fmt: skip
    head = [
        "noise", "steps", "processor minutes", "ELBO", "KL", "PSNR, reconstruction", "prediction, best of samples",
        "prediction, one sample", "prediction, mean frame", "Hurst index",
    ]  # fmt: skip
    setting = report["setting"]
    return [
        f"**Moving digits**, 32 x 32 pixels and 16 frames, {setting['test_videos']} held-out videos of digits not trained on; predictions "
        f"see five frames, {setting['samples']} samples each (`video.py`). One seed.",
        "",
        *markdown_table([head, *rows]),
    ]


def speed(report: dict[str, Any]) -> list[str]:
    """Tables of times and memory."""
    lines: list[str] = []
    if "tightness" in report:
        names = [name for name in report["tightness"][0] if name.startswith("gap")]
        rows = [
            [r["hurst"], *(f"{abs(r[name]):.1e}" if name.endswith(("linearised", "Guide")) else f"{r[name]:.3f}" for name in names)]
            for r in report["tightness"]
        ]  # fmt: skip
        lines += ["**Gap to the Kalman evidence** of a linear model at 100 steps, nats (`tightness.py`).", ""]
        lines += markdown_table([["H", *(name.removeprefix("gap of ") for name in names)], *rows])
        lines += [
            "(b) and (c) start at the exact posterior of a linear model. The others are trained by Adam from the prior: those "
            "of `LatentSDE` are networks that read the series, and must learn the approach to each observation.",
            "",
        ]
    if "gaussian" in report:
        rows = []
        for r in report["gaussian"]:
            for name, ratio in r["ratio"].items():
                rows.append([
                    r["model"], name, f"{1e3 * r['seconds']['Gaussian']:.1f}", f"{1e3 * r['seconds'][name]:.1f}", f"{ratio:.0f}",
                ])  # fmt: skip
        lines += [
            "**A gradient** of the Gaussian posterior (c) against the simulated control posterior with 32 paths, 200 steps. The "
            "published bridge has a control network of width 1000-1000.",
            "",
        ]
        lines += markdown_table([["model", "against", "(c), ms", "other, ms", "ratio"], *rows])
    if "lorenz" in report:
        found = report["lorenz"]
        rows = [
            [name, f"{1e3 * seconds:.0f}", f"{found['ratio an iteration'].get(name, 1):.1f}"]
            for name, seconds in found["seconds an iteration"].items()
        ]
        other = RESULTS / "diffrax.json"
        if other.exists():
            peer, base = (
                json.loads(other.read_text(encoding="utf-8")),
                found["seconds an iteration"]["torchsde"],
            )
            for name in (k for k in peer if k.startswith("diffrax, ")):
                seconds = peer[name]["seconds an iteration"]
                rows.append([
                    f"{name} ({peer['diffrax']}; {peer[name]['seconds to compile']:.0f} s to compile)",
                    f"{1e3 * seconds:.0f}",
                    f"{base / seconds:.1f}",
                ])  # fmt: skip
        lines += [
            f"**Stochastic Lorenz latent model**, the sizes of torchsde's example, batch {found['batch']}: one iteration.",
            "",
        ]
        lines += markdown_table([["posterior", "ms", "times faster than torchsde"], *rows])
        if "race" in found:
            lines += _race(found["race"])
    if "memory" in report:
        found = report["memory"]
        rows = [
            [name, f"{size:.0f}", f"{found['share of torchsde'].get(name, 1.0):.2f}"]
            for name, size in found["MiB"].items()
        ]
        lines += [
            f"**Memory** of one gradient of the stochastic Lorenz latent model at {found['steps']} steps, "
            f"batch {found['batch']}: growth of the peak resident size.",
            "",
        ]
        lines += markdown_table([["posterior", "MiB", "share of torchsde"], *rows])
    return lines


def _race(trial: dict[str, Any]) -> list[str]:
    """Say who came to the peer's bound, and when."""
    lines = [
        f"Race at batch {trial['batch']} to the best bound on unseen series that torchsde comes to in "
        f"{trial['torchsde'][-1]['iteration']} iterations ({trial['target']:.0f} nats per series, "
        f"{trial['torchsde'][-1]['seconds']:.0f} processor seconds):"
    ]
    for name, run in trial.items():
        if not name.startswith("stochdyn"):
            continue
        last = run["track"][-1]
        if run["reached"]:
            verdict = f"above it after {last['seconds']:.0f} s and {last['iteration']} iterations, {run['ratio']:.1f} times faster"
        else:
            verdict = f"NOT above it in that time ({max(row['elbo'] for row in run['track']):.0f})"
        lines.append(f"- {name}: {verdict}.")
    fine = trial["matching on a fine grid"]
    lines += [
        "",
        f"The bound of matching is that of continuous time; true weights of paths simulated in {fine['steps']} steps give "
        f"{fine['simulated']:.0f} ± {fine['stderr']:.0f} where it says {fine['bound']:.0f} ({fine['series']} series). On the 200 steps of the "
        "other two its drift is too stiff for Euler's method. Each model's bound is on its own evidence.",
        "",
    ]
    return lines


def main() -> None:
    """Write the page."""
    parts: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "bridge": bridge, "calibration": calibration, "hurst_recovery": hurst, "double_well": double_well, "speed": speed, "video": video,
        "attractors": attractors, "rough_bergomi": rough_bergomi,
    }  # fmt: skip
    lines, known = [], None
    for name, render in parts.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            known = known or report.get("machine")
            lines += render(report)
    if known:
        lines.append(
            f"Measured on {known['cores']} cores ({known['processor']}), {known['threads']} thread, torch {known['torch']}, "
            f"Python {known['python']}; processor time, the least of interleaved repetitions where times are compared. Other work ran on "
            "the machine."
        )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
