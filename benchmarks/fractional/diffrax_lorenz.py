"""The Lorenz latent model of ``lorenz.py`` in diffrax: processor seconds of one gradient.

    OMP_NUM_THREADS=1 python benchmarks/fractional/diffrax_lorenz.py

For a Python that has JAX and diffrax; it needs neither PyTorch nor stochdyn. It writes ``results/diffrax.json``, from which
``table.py`` puts a row beside the library's and torchsde's. Compilation isn't counted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import diffrax
import jax
import jax.numpy as jnp

RESULTS = Path(__file__).parent / "results" / "diffrax.json"
LATENT, CONTEXT, HIDDEN, SCALE, END, COUNT, DT = 4, 64, 128, 0.01, 2.0, 100, 0.01


def _linear(key: Any, fan_in: int, fan_out: int) -> dict[str, Any]:
    bound = fan_in**-0.5
    return {
        "w": jax.random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound),
        "b": jnp.zeros(fan_out),
    }


def _apply(layer: dict[str, Any], x: Any) -> Any:
    return x @ layer["w"] + layer["b"]


def _net(layers: list[dict[str, Any]], x: Any) -> Any:
    for layer in layers[:-1]:
        x = jax.nn.softplus(_apply(layer, x))
    return _apply(layers[-1], x)


def parameters(key: Any) -> dict[str, Any]:
    """Return the weights: recurrent encoder, start, both drifts, diffusions of the components, decoder."""
    keys = iter(jax.random.split(key, 64))

    def net(*sizes: int) -> list[dict[str, Any]]:
        return [_linear(next(keys), a, b) for a, b in itertools.pairwise(sizes)]

    strengths = [net(1, HIDDEN, 1) for _ in range(LATENT)]
    return {
        "gru_in": _linear(next(keys), 3, 3 * HIDDEN),
        "gru_state": _linear(next(keys), HIDDEN, 3 * HIDDEN),
        "context": _linear(next(keys), HIDDEN, CONTEXT),
        "start": _linear(next(keys), CONTEXT, 2 * LATENT),
        "posterior": net(LATENT + CONTEXT, HIDDEN, HIDDEN, LATENT),
        "prior": net(LATENT, HIDDEN, HIDDEN, LATENT),
        "strengths": jax.tree.map(lambda *x: jnp.stack(x), *strengths),
        "decoder": _linear(next(keys), LATENT, 3),
        "start_mean": jnp.zeros(LATENT),
        "start_log_scale": jnp.zeros(LATENT),
    }


def _encode(p: dict[str, Any], values: Any) -> Any:
    def cell(h: Any, x: Any) -> tuple[Any, Any]:
        r_in, z_in, n_in = jnp.split(_apply(p["gru_in"], x), 3, -1)
        r_h, z_h, n_h = jnp.split(_apply(p["gru_state"], h), 3, -1)
        r, z = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
        h = (1 - z) * jnp.tanh(n_in + r * n_h) + z * h
        return h, h

    start = jnp.zeros((values.shape[1], HIDDEN))
    return _apply(p["context"], jax.lax.scan(cell, start, values, reverse=True)[1])


def _diffusion(p: dict[str, Any], z: Any) -> Any:
    def one(layers: list[dict[str, Any]], x: Any) -> Any:
        return jax.nn.sigmoid(_net(layers, x[..., None]))[..., 0]

    return jax.vmap(one, in_axes=(0, -1), out_axes=-1)(p["strengths"], z)


def loss(p: dict[str, Any], values: Any, key: Any, direct: bool) -> Any:
    """Return minus the bound; ``values (100, B, 3)``. ``direct``: back-propagate through all steps, without checkpoints."""
    ts = jnp.linspace(0.0, END, COUNT)
    context = _encode(p, values)
    mean, log_scale = jnp.split(_apply(p["start"], context[0]), 2, -1)
    first, second = jax.random.split(key)
    z0 = mean + jnp.exp(log_scale) * jax.random.normal(first, mean.shape)

    def drift(t: Any, y: Any, args: Any) -> Any:
        z = y[:, :LATENT]
        place = jnp.minimum(jnp.searchsorted(ts, t, side="right"), COUNT - 1)
        f = _net(p["posterior"], jnp.concatenate([z, context[place]], -1))
        u = (f - _net(p["prior"], z)) / _diffusion(p, z)
        return jnp.concatenate([f, 0.5 * jnp.sum(u**2, -1, keepdims=True)], -1)

    def strength(t: Any, y: Any, args: Any) -> Any:
        return jnp.pad(_diffusion(p, y[:, :LATENT]), ((0, 0), (0, 1)))

    y0 = jnp.concatenate([z0, jnp.zeros((z0.shape[0], 1))], -1)
    noise = diffrax.VirtualBrownianTree(0.0, END, DT / 2, y0.shape, second)
    adjoint = diffrax.DirectAdjoint() if direct else diffrax.RecursiveCheckpointAdjoint()
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.WeaklyDiagonalControlTerm(strength, noise))
    run = diffrax.diffeqsolve(
        terms,
        diffrax.Euler(),
        0.0,
        END,
        DT,
        y0,
        saveat=diffrax.SaveAt(ts=ts),
        max_steps=round(END / DT) + 8,
        adjoint=adjoint,
    )
    z, kl = run.ys[..., :LATENT], run.ys[-1, :, LATENT]
    gap = (values - _apply(p["decoder"], z)) / SCALE
    fit = -0.5 * jnp.sum(gap**2, (0, 2)) - gap.shape[0] * 3 * jnp.log(SCALE * (2 * jnp.pi) ** 0.5)
    s = p["start_log_scale"]
    start = (
        s
        - log_scale
        + 0.5 * (jnp.exp(2 * (log_scale - s)) + ((mean - p["start_mean"]) / jnp.exp(s)) ** 2 - 1)
    )
    return -jnp.mean(fit - kl - jnp.sum(start, -1))


def main() -> None:
    """Time a gradient."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    key = jax.random.key(0)
    p = parameters(key)
    values = jax.random.normal(key, (COUNT, options.batch, 3))
    row: dict[str, Any] = {"batch": options.batch, "jax": version("jax"), "diffrax": version("diffrax")}
    for name, direct in (("diffrax, checkpointed", False), ("diffrax, direct", True)):
        gradient = jax.jit(jax.value_and_grad(functools.partial(loss, direct=direct)))
        begin = time.process_time()
        jax.block_until_ready(gradient(p, values, key))
        row[name] = {"seconds to compile": time.process_time() - begin}
        times = []
        for i in range(options.repeats):
            begin = time.process_time()
            value, slope = jax.block_until_ready(gradient(p, values, jax.random.key(i)))
            times.append(time.process_time() - begin)
            assert bool(jnp.isfinite(value))
            assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slope))
        row[name]["seconds an iteration"] = min(times)
    print(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
