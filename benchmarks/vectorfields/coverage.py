"""Coverage of 95 % bands at places that are no nodes, for every kernel and backend, on clouds and meshes.

    OMP_NUM_THREADS=1 python benchmarks/vectorfields/coverage.py

Half the nodes are observed with noise of a tenth of the field's standard deviation. Asked for are new points inside the cloud, in a
hole of it, and past its border. Fields are drawn from a Gaussian process of the surrounding space (Matérn 3/2, *rough*, or squared
exponential, *smooth*) and projected to the tangent planes, which is the prior of none of the models but one. Writes
``results/coverage.json``; ``table.py`` makes the table of the documentation.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.vectorfields import RVGP, HodgeMatern, PointCloud, ScalarGP

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

RESULTS = Path(__file__).parent / "results" / "coverage.json"
NOISE = 0.1
Places = dict[str, np.ndarray]


def sphere(n: int, rng: np.random.Generator) -> np.ndarray:
    """Independent uniform points on the unit sphere."""
    x = rng.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def even(n: int) -> np.ndarray:
    """Evenly spread points on the unit sphere."""
    i = np.arange(n) + 0.5
    z, turn = 1 - 2 * i / n, np.pi * (1 + 5**0.5) * i
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(turn), r * np.sin(turn), z], 1)


def hull(points: np.ndarray) -> np.ndarray:
    """Triangles of points on a sphere, all turning outwards."""
    from scipy.spatial import ConvexHull

    faces = ConvexHull(points).simplices.astype(np.int64)
    a = points[faces]
    inwards = (np.cross(a[:, 1] - a[:, 0], a[:, 2] - a[:, 0]) * a.mean(1)).sum(1) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    return faces


def geometry(name: str, n: int, rng: np.random.Generator) -> tuple[PointCloud, Places]:
    """A cloud, and the new places on it."""
    if name == "random points of a sphere":
        return PointCloud(sphere(n, rng), 12, dim=2), {"inside": sphere(500, rng)}
    if name == "even points of a sphere":
        return PointCloud(even(n), 12, dim=2), {"inside": sphere(500, rng)}
    if name == "mesh of a sphere":
        nodes = even(n)
        return PointCloud.from_mesh(nodes, hull(nodes)), {"inside": sphere(500, rng)}
    x = rng.uniform(-1, 1, (2 * n, 2))
    x = x[np.hypot(*x.T) > 0.35][:n]
    inside = rng.uniform(-0.9, 0.9, (1500, 2))
    angle, radius = rng.uniform(0, 2 * np.pi, 200), 0.35 * np.sqrt(rng.uniform(0, 0.8, 200))
    past = np.stack([rng.uniform(1.02, 1.3, 200), rng.uniform(-0.9, 0.9, 200)], 1)
    return PointCloud(x, 12, dim=2), {
        "inside": inside[np.hypot(*inside.T) > 0.45][:500],
        "hole": np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1),
        "border": past,
    }


GEOMETRIES = (
    "random points of a sphere",
    "even points of a sphere",
    "mesh of a sphere",
    "random points of a square with a hole",
)
MODELS: dict[str, Callable[[PointCloud], RVGP | ScalarGP]] = {
    "connection": RVGP,
    "connection, precision": lambda c: RVGP(c, backend="precision"),
    "projected": lambda c: RVGP(c, "projected"),
    "ambient": lambda c: RVGP(c, "ambient"),
    "Hodge": lambda c: RVGP(c, HodgeMatern(c)),
    "functions": ScalarGP,
    "functions, precision": lambda c: ScalarGP(c, backend="precision"),
    "functions, ambient": lambda c: ScalarGP(c, "ambient"),
}


def draw(points: np.ndarray, kind: str, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Draw functions of the surrounding space with variance one and correlation length 0.5 at points."""
    r = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1)) / 0.5
    covariance = (
        (1 + math.sqrt(3) * r) * np.exp(-math.sqrt(3) * r) if kind == "rough" else np.exp(-0.5 * r * r)
    )
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ rng.normal(size=(len(points), channels))


def tangent(points: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Project a field of space to the unit sphere; the plane has nothing to project."""
    if points.shape[1] == 2:
        return field
    return field - (field * points).sum(1, keepdims=True) * points


def measure(geometry_name: str, model: str, kind: str, n: int, seeds: int) -> Iterator[dict[str, Any]]:
    """Pool the scaled errors of several draws, and report their coverage and root mean square at each kind of place."""
    pooled: dict[str, list[Tensor]] = {}
    priors: dict[str, list[float]] = {}
    start = time.process_time()
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        cloud, places = geometry(geometry_name, n, rng)
        everywhere = np.concatenate([cloud.array, *places.values()])
        functions = model.startswith("functions")
        truth = draw(everywhere, kind, 1 if functions else everywhere.shape[1], rng)
        truth = truth[:, 0] if functions else tangent(everywhere, truth)
        noise = NOISE * rng.normal(size=truth.shape)
        seen = rng.permutation(len(cloud))[: len(cloud) // 2]
        data = truth[seen] + (noise if functions else tangent(everywhere, noise))[seen]
        gp = MODELS[model](cloud).fit(seen, data)
        held = np.setdiff1d(np.arange(len(cloud)), seen)
        asked: dict[str, tuple[Any, np.ndarray]] = {"nodes": (held, truth[held])}
        begin = len(cloud)
        for name, where in places.items():
            asked[name] = (where, truth[begin : begin + len(where)])
            begin += len(where)
        for name, (where, exact) in asked.items():
            mean, cov = gp.predict(where)
            gap = mean - torch.as_tensor(exact)
            if functions:
                scaled, variance = gap / cov.sqrt(), cov
            else:
                spread = cov.diagonal(dim1=-2, dim2=-1)
                scaled = torch.einsum("qdm,qd->qm", gp.frames(where), gap) / spread.sqrt()
                variance = spread
            pooled.setdefault(name, []).append(scaled.flatten())
            priors.setdefault(name, []).append(float((variance / gp.amplitude).max()))
    for name, parts in pooled.items():
        z = torch.cat(parts)
        yield {
            "geometry": geometry_name,
            "model": model,
            "field": kind,
            "places": name,
            "coverage": float((z.abs() < 1.96).double().mean()),
            "rms z": float(z.square().mean().sqrt()),
            "largest variance over amplitude": max(priors[name]),
            "seconds": time.process_time() - start,
        }


def main() -> None:
    """Measure every cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--model", default="", help="only models whose names hold this")
    parser.add_argument("--only", default="", help="only geometries whose names hold this")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that it runs; writes nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    n, seeds = (80, 1) if arguments.smoke else (arguments.points, arguments.seeds)
    rows = []
    if not arguments.smoke and RESULTS.exists():
        rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    for name in GEOMETRIES:
        for model in MODELS:
            if arguments.model not in model or arguments.only not in name:
                continue
            if model == "Hodge" and "square" in name:
                continue
            for kind in ("rough", "smooth"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of places off the cloud, which are asked for here
                    found = list(measure(name, model, kind, n, seeds))
                about = (name, model, kind)
                rows = [r for r in rows if (r["geometry"], r["model"], r["field"]) != about] + found
                for row in found:
                    print(
                        f"{name}, {model}, {kind}, {row['places']}: coverage {row['coverage']:.3f}, rms z {row['rms z']:.2f}",
                        flush=True,
                    )
                if not arguments.smoke:
                    report = {
                        "machine": machine("scipy", "gpytorch"),
                        "points": n,
                        "seeds": seeds,
                        "rows": rows,
                    }
                    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
