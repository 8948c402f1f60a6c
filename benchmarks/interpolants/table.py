"""Turn the JSON files of ``run.py`` into the tables of the documentation; parts that weren't measured are left out."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import write_table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
TABLE = ROOT / "docs" / "generated" / "interpolants_benchmarks.md"


def _rows(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in (header, ["---"] * len(header), *rows)]


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}"


def speed(report: dict[str, Any]) -> list[str]:
    """Training steps per second."""
    rows = []
    for r in report["rows"]:
        ours, theirs = r["steps per second"]["stochdyn"], r["steps per second"]["TorchCFM"]
        target = "" if r["target"] is None else f"{r['target']:g}"
        rows.append(
            [r["coupling"], str(r["reuse"]), f"{ours:.0f}", f"{theirs:.0f}", f"{r['ratio']:.2f}", target]
        )
    lead = (
        f"Training steps per second at batch {report['rows'][0]['batch']}, {report['task']}, {report['network']}; the least "
        "processor time of interleaved blocks. *Steps per plan* says how many steps one coupling serves, each with fresh times and "
        "latents; TorchCFM makes a plan for every step."
    )
    notes = []
    for r in report["rows"]:
        if r["target"] is None or r["ratio"] >= r["target"]:
            continue
        note = f"The target of the {r['coupling']} coupling is missed."
        if "network alone" in r["steps per second"]:
            limit = r["steps per second"]["network alone"] / r["steps per second"]["TorchCFM"]
            note += (
                " A step of the network with its optimiser alone, on points and targets that cost nothing, is "
                f"{limit:.2f} times as fast as TorchCFM's: no more is to be had with this network run in this way."
            )
        notes.append(note)
    table = _rows(["coupling", "steps a plan", "stochdyn", "TorchCFM", "ratio", "target"], rows)
    return [lead, "", *table, *(line for note in notes for line in ("", note))]


def coupling(report: dict[str, Any]) -> list[str]:
    """What entropic plans are worth."""
    rows = []
    for r in report["rows"]:
        for who in ("stochdyn", "TorchCFM"):
            v = r[who]
            mean = ", ".join(f"{x:.2f}" for x in v["target mean"])
            rows.append([
                f"{r['sigma']:g}", who, f"{v['marginal error']:.1e}", str(v["distinct sources"]),
                str(v["distinct targets"]), f"({mean})", f"{1e3 * v['seconds']:.0f}",
            ])  # fmt: skip
    true = ", ".join(f"{x:.2f}" for x in report["rows"][0]["true mean"])
    lead = (
        f"One batch of {report['batch']} coupled entropically at diffusion σ, {report['task']}: largest L1 error of a marginal, how "
        f"many distinct points are used, and the mean of the drawn targets (of the batch: ({true}))."
    )
    header = ["σ", "library", "marginal error", "sources", "targets", "mean of targets", "ms"]
    return [lead, "", *_rows(header, rows)]


def transport(report: dict[str, Any]) -> list[str]:
    """Distance to the target and straightness."""
    cells: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    floors = {}
    for r in report["rows"]:
        pair = (r["source"], r["target"])
        if "floor" in r:
            floors[pair] = r["floor"]
            continue
        for key in ("W2", "NPE", "seconds"):
            cells[pair][r["method"]][key].append(r[key])
    rows = []
    for pair, methods in cells.items():
        for method, values in methods.items():
            rows.append([
                f"{pair[0]} → {pair[1]}", method, _mean(values["W2"]), f"{floors[pair]:.3f}", _mean(values["NPE"]),
                f"{sum(values['seconds']) / len(values['seconds']):.1f}",
            ])  # fmt: skip
    lead = (
        f"Flows after {report['steps']} steps at batch {report['batch']}, {report['seeds']} seeds, the same network, learning rates "
        f"and averaging for all; W2 to {report['test points']} held-out points (mean ± standard deviation over seeds; the floor is "
        "the distance of two such samples of the target itself), and normalised path energy "
        "NPE = |∫E|v|² − W2²| / W2² of the two laws. Seconds are processor time of the training."
    )
    paired = [
        _paired(pair, methods["stochdyn, ot"], methods["TorchCFM, ot"]) for pair, methods in cells.items()
    ]
    after = (
        "The same data and seeds serve all, so that differences, stochdyn less TorchCFM with OT plans, are known better than the "
        f"values (mean ± its standard error): {'; '.join(paired)}."
    )
    return [lead, "", *_rows(["laws", "method", "W2", "floor", "NPE", "s"], rows), "", after]


def _paired(pair: tuple[str, str], ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> str:
    parts = []
    for key in ("W2", "NPE"):
        gaps = [a - b for a, b in zip(ours[key], theirs[key], strict=True)]
        mean = sum(gaps) / len(gaps)
        error = (sum((g - mean) ** 2 for g in gaps) / max(len(gaps) - 1, 1) / len(gaps)) ** 0.5
        parts.append(f"{key} {mean:+.4f} ± {error:.4f}")
    return f"{pair[0]} → {pair[1]} {', '.join(parts)}"


def sampling(report: dict[str, Any]) -> list[str]:
    """Evaluations and distance."""
    cells: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    base: dict[tuple[str, str, int], float] = {}
    for r in report["rows"]:
        if r["method"] == "euler":
            base[r["source"], r["target"], r["seed"]] = r["W2"]
    worst: dict[tuple[str, int, int], float] = defaultdict(float)
    for r in report["rows"]:
        key = (r["method"], r["steps"], r["evaluations"])
        ratio = r["W2"] / base[r["source"], r["target"], r["seed"]]
        cells[key].append(ratio)
        worst[key] = max(worst[key], ratio)
    rows = [
        [k[0], str(k[1]), str(k[2]), f"{sum(v) / len(v):.3f}", f"{worst[k]:.3f}"] for k, v in cells.items()
    ]
    lead = "W2 to the target relative to Euler's method with 100 steps, over all pairs of laws and seeds of the table above."
    return [lead, "", *_rows(["method", "steps", "evaluations", "W2 ratio, mean", "worst"], rows)]


def _network(report: dict[str, Any]) -> str:
    network = report["network"]
    waves = f", {network['frequencies']} random frequencies" if "frequencies" in network else ""
    return f"WhitenedField, {network['depth']} x {network['width']}{waves}"


def _mixture_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for r in report["rows"]:
        exact = f"{r['KL']:.2f} ± {r['stderr']:.2f}" if "KL" in r else ""
        bound = f"{r['girsanov bound']:.1f}" if "girsanov bound" in r else ""
        rows.append([
            r["fields"], r["epsilon"], exact, bound, f"{r['kernel KL']:.4f} ± {r['kernel stderr']:.4f}"
        ])  # fmt: skip
    return rows


_MIXTURE = ["fields", "ε", "KL", "Girsanov", "kernel KL"]


def mixture(report: dict[str, Any]) -> list[str]:
    """The mixture in 128 dimensions."""
    lead = (
        f"Five modes in {report['dim']} dimensions, {report['steps']} training steps at batch {report['batch']} "
        f"({_network(report)}; {sum(report['training seconds']) / 60:.0f} processor minutes for all fields): KL(ρ₁‖model) in nats by the "
        "density of the flow (ε = 0); Girsanov's bound on it with the true fields (ε > 0; weights of paths degenerate in so many "
        f"dimensions); and the paper's metric, a divergence of kernel densities of two coordinates of {report['draws']} draws of "
        f"{report['grid']} steps. *exact*: the same with the true fields, which is the floor of each metric, as is a second sample of "
        "the target. The standard errors of the last column don't know of the noise in the kernel densities: second samples of the target "
        "come out between -0.005 and 0.01."
    )
    return [lead, "", *_rows(_MIXTURE, _mixture_rows(report))]


def mixture_long(report: dict[str, Any]) -> list[str]:
    """One pair of fields, trained longer."""
    lead = (
        f"The first pair trained longer ({report['steps']} steps, {sum(report['training seconds']) / 60:.0f} processor minutes):"
    )  # fmt: skip
    return [lead, "", *_rows(_MIXTURE, _mixture_rows(report)[1:])]


def checkerboard(report: dict[str, Any]) -> list[str]:
    """The checkerboard."""
    rows = []
    for r in report["rows"]:
        bound = f"{r['girsanov bound']:.2f}" if r.get("girsanov bound") else ""
        rows.append(
            [r["gamma"], r["fields"], r["epsilon"], f"{r['KL']:.3f} ± {r['stderr']:.3f}", bound]
        )  # fmt: skip
    lead = (
        f"Checkerboard, {report['steps']} training steps at batch {report['batch']} ({_network(report)}; "
        f"{sum(report['training seconds']) / 60:.0f} processor minutes for all fields): KL(ρ₁‖model) by exact density of the flow (ε = 0), or of the "
        f"Euler-Maruyama scheme with {report['grid']} steps from {report['paths']} weighted paths per point (an upper estimate). *exact*: the same "
        "with the true fields: what is left comes from steps and paths, and is the floor. The bound holds in continuous time."
    )
    return [lead, "", *_rows(["latent", "fields", "ε", "KL", "Girsanov"], rows)]


def populations(report: dict[str, Any]) -> list[str]:
    """Populations that were never seen."""
    lines = []
    if "gaussians" in report:
        rows = [
            [
                r["law"], r["model"], *(f"{e:.4f} ± {s:.4f}" for e, s in zip(r["error"].values(), r["stderr"].values(), strict=True)),
                f"{r['processor seconds']:.0f}" if "processor seconds" in r else "",
            ]
            for r in report["gaussians"]["rows"]
        ]  # fmt: skip
        lines += [
            "Twenty Gaussian populations that were never seen, after two hundred that were (d = 2, noise to be removed): mean squared error of "
            "the velocity, whose exact value is known, with the standard error over populations. Scales along their axes are of 0.2 to 2, of "
            "variances or of widths. *blind*: a flow that isn't told the population; *least possible*: the mean of the velocity given the known "
            "points and the way populations are drawn, which nothing can beat in the mean.",
            "",
            *_rows(["scales", "model", "knowing 32 points", "128", "2000", "processor seconds"], rows),
            "",
        ]
    if "rotated" in report:
        rows = [
            [r["model"], *(f"{r['w2'][k]:.3f}" if k in r["w2"] else "" for k in ("0.0", "0.7", "1.9"))]
            for r in report["rotated"]["rows"]
        ]
        lines += [
            "A Gaussian of variances 1 and 0.05, turned by an angle that only the population shows: W2 of the moments of what the flow makes of it "
            "from the target's. The best field that is blind to the angle leaves 0.237 at angle 0.",
            "",
            *_rows(["model", "angle 0", "0.7", "1.9"], rows),
            "",
        ]
    if "letters" in report:
        letters = report["letters"]
        rows = [
            [r["part"], r["model"], f"{r['distance']:.4f} ± {r['stderr']:.4f}", r["against blind"]]
            for r in letters["rows"]
        ]
        cost = ", ".join(
            f"{k} {v['processor seconds']:.0f} for {v['steps']} steps" for k, v in letters["cost"].items()
        )
        lines += [
            f"Letters with noise of 0.5, {letters['count']} rotations of each of 24 letters in training, {letters['metric']} of 400 points from "
            f"the clean letter over ten rotations, X and Y never seen (processor seconds: {cost}). The last column "
            "is the paired difference from the blind flow.",
            "",
            *_rows(["letter", "model", letters["metric"], "less the blind flow's"], rows),
            "",
        ]
    if "drug screen" in report:
        rows = [
            [
                r["model"], f"{r['distance']:.3f}", f"{r['floor']:.3f}", f"{r['excess']:.3f}",
                f"{r['interval'][0]:.3f} to {r['interval'][1]:.3f}",
                f"{r['against blind']['mean']:+.3f} ± {r['against blind']['stderr']:.3f}",
            ]
            for r in report["drug screen"]["rows"]
        ]  # fmt: skip
        lines += [
            "A synthetic drug screen, twelve held-out patients under three treatments that 48 others had (cells aren't paired): W1, its floor (two "
            "samples of the target), and the excess with its 90 % bootstrap interval over populations.",
            "",
            *_rows(["model", "W1", "floor", "excess", "interval", "less the blind flow's"], rows),
        ]
    return lines


def two_moons(report: dict[str, Any]) -> list[str]:
    """Simulation-based inference."""
    rows = [
        [
            "(" + ", ".join(f"{v:.2f}" for v in r["observation"]) + ")", str(r["draws"]), f"{r['c2st']:.3f} ± {r['stderr']:.3f}",
            f"{r['w2']:.4f}", f"{r['floor']:.4f}", f"{100 * r['outside']:.1f} %",
        ]
        for r in report["rows"]
    ]  # fmt: skip
    mean = sum(r["c2st"] for r in report["rows"]) / len(report["rows"])
    cost = f"{report['steps']} steps in {report['training seconds']:.0f} processor seconds"
    lead = (
        f"Two moons from {report['simulations']} simulations ({cost}): accuracy of a classifier between draws and as many exact ones (0.5 is "
        f"perfect; mean {mean:.3f}, where 0.6 was aimed at; the sizes of the first three are those of the published benchmark), W2 and W2 of two "
        "exact samples, of 2000 points each, and the share of draws outside the prior, which are thrown away. The crescents are a hundredth of the "
        "prior wide; near a corner of the prior one of the two is cut off."
    )
    return [lead, "", *_rows(["observation", "draws", "C2ST", "W2", "floor", "outside"], rows)]


def nuts(report: dict[str, Any]) -> list[str]:
    """A trained prior in a Pyro model."""
    rows = [
        [
            r["network"],
            r["method"],
            str(r["steps"]),
            f"{r['density']:.1f}",
            f"{r['noise']:.1f}",
            f"{r['ratio']:.1f}",
        ]
        for r in report["gradients"]
    ]
    lead = (
        "A trained flow of two modes in the plane as the prior of a Pyro model, one observation of the point: milliseconds of processor time per "
        "gradient of the model's density with the point as the random site, through the density of the flow, and with its noise "
        "(`noise_site`), on the same grid. Ten times was aimed at."
    )
    shown = "({:.2f}, {:.2f})".format
    chains = [
        [name, f"{c['seconds']:.0f}", f"{c['effective']:.0f}", f"{1e3 * c['seconds'] / c['effective']:.0f}", shown(*c["mean"]),
         shown(*c["deviation"])]
        for name, c in report["chains"].items()
    ]  # fmt: skip
    exact = report["exact"]
    chains.append(
        ["weighted draws of the prior", "", "", "", shown(*exact["mean"]), shown(*exact["deviation"])]
    )
    per_draw = {name: c["seconds"] / c["effective"] for name, c in report["chains"].items()}
    second = (
        "A chain of NUTS for each (FieldNetwork, heun, 10 steps; 100 steps of warm-up and 400 draws), with the number of independent draws that it "
        "is worth, and the posterior's moments beside those of 100 000 weighted draws of the same prior. "
        f"An effective draw through the density costs {per_draw['density'] / per_draw['noise']:.1f} times what it costs through the noise. With two "
        "modes in its prior this posterior is harder to walk in noise, where a chain takes more and shorter steps: on so coarse a grid they take "
        "what a gradient saves. On the default grid a gradient saves more."
    )
    return [
        lead, "", *_rows(["network", "method", "steps", "density", "noise", "ratio"], rows), "", second, "",
        *_rows(["random site", "seconds", "effective draws", "ms per effective draw", "mean", "deviation"], chains),
    ]  # fmt: skip


def jobs(report: dict[str, Any]) -> list[str]:
    """Practitioners' jobs."""
    rows = []
    for name in ("images by label", "restoration", "translation"):
        if name not in report:
            continue
        part = report[name]
        found = []
        for key, value in part.items():
            if key in ("steps", "processor seconds"):
                continue
            if isinstance(value, dict):
                found.append(f"{key}: " + ", ".join(f"{k} {v:.2f}" for k, v in value.items()))
            else:
                found.append(f"{key} {value:.3g}")
        rows.append([name, "; ".join(found), str(part["steps"]), f"{part['processor seconds']:.0f}"])
    lead = (
        "Jobs (digits of 8 by 8 pixels; restoration of 2 by 2 block means with noise of 0.1; two moons carried to eight Gaussians): what is reached "
        "in the processor seconds of the last column. *Read as asked*: the share that a classifier of real digits reads as the label asked for, by "
        "guidance. *Restoration*: a draw from a posterior has twice the squared error of the posterior's mean, 3 dB, so the mean of the draws is "
        "what a regression is to be compared with; draws are what looks like images. *Told from clean images*: accuracy of a classifier between "
        "restored and other clean images (0.5 where it can't tell)."
    )
    return [lead, "", *_rows(["job", "figures", "steps", "processor seconds"], rows)]


PARTS = {
    "speed": speed,
    "coupling": coupling,
    "transport": transport,
    "sampling": sampling,
    "mixture": mixture,
    "mixture_long": mixture_long,
    "checkerboard": checkerboard,
    "populations": populations,
    "two_moons": two_moons,
    "nuts": nuts,
    "jobs": jobs,
}


def render(reports: dict[str, dict[str, Any]]) -> str:
    """Return the Markdown of all reports that there are."""
    lines: list[str] = []
    for name, function in PARTS.items():
        if name in reports:
            lines += [*function(reports[name]), ""]
    machine = next(iter(reports.values()))["machine"]
    lines.append(
        f"Measured on {machine['cores']} cores shared with other work ({machine['processor']}), {machine['threads']} thread, torch "
        f"{machine['torch']}, torchcfm {machine['torchcfm']}, POT {machine['POT']}, Python {machine['python']}."
    )
    return "\n".join(lines) + "\n"


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the reports in a folder by part."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.exists()}


def main() -> None:
    """Write the tables."""
    write_table(lambda folder: render(read(folder)), RESULTS, TABLE, __doc__)


if __name__ == "__main__":
    main()
