"""GaussianChain against the dense joint Gaussian of all its states."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.core import GaussianChain
from stochdyn.core.gaussian import psd_factor
from stochdyn.errors import DtypeMismatchError, NonFiniteError, ShapeError, SingularDiffusionError

F64 = torch.float64


def _rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def _tensors(n: int, z: int, batch: tuple[int, ...] = (), rank: int | None = None, fixed: bool = False):
    """Random chain tensors with noise of the given rank and, if asked, a fixed start."""
    q = _rand(n, *batch, z, z if rank is None else rank, seed=1)
    p = _rand(*batch, z, z, seed=2) * (0.0 if fixed else 1.0)
    return (
        _rand(*batch, z, seed=3),
        p @ p.mT,
        _rand(n, *batch, z, z, seed=4) / math.sqrt(z),
        _rand(n, *batch, z, seed=5),
        q @ q.mT,
    )


def _dense(m0: Tensor, p0: Tensor, a: Tensor, c: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Joint mean ``((N+1) z,)`` and covariance of an unbatched chain, from its moving-average form."""
    n, z = a.shape[0], a.shape[-1]
    rows = [torch.zeros(z, (n + 1) * z, dtype=F64)]
    rows[0][:, :z] = torch.eye(z, dtype=F64)
    mean = [m0]
    for k in range(n):
        row = a[k] @ rows[-1]
        row[:, (k + 1) * z : (k + 2) * z] += torch.eye(z, dtype=F64)
        rows.append(row)
        mean.append(a[k] @ mean[-1] + c[k])
    lift = torch.cat(rows)
    return torch.cat(mean), lift @ torch.block_diag(p0, *q) @ lift.T


def _condition(mean: Tensor, cov: Tensor, h: Tensor, r: Tensor, y: Tensor, keep: Tensor):
    """Exact posterior mean and covariance of the joint state, and the log evidence, of kept components."""
    h, r, y = h[keep], r[keep][:, keep], y[keep]
    s = h @ cov @ h.T + r
    gain = torch.linalg.solve(s, h @ cov).T
    v = y - h @ mean
    evidence = -0.5 * (v @ torch.linalg.solve(s, v) + torch.logdet(s) + len(y) * math.log(2 * math.pi))
    return mean + gain @ v, cov - gain @ h @ cov, evidence


CASES = [
    pytest.param({"n": 5, "z": 3, "p": 1}, id="scalar-observation"),
    pytest.param({"n": 5, "z": 3, "p": 2}, id="vector-observation"),
    pytest.param({"n": 4, "z": 4, "p": 2, "rank": 1, "fixed": True}, id="rank-one-noise-fixed-start"),
    pytest.param({"n": 1, "z": 1, "p": 1}, id="one-step"),
]


@pytest.mark.parametrize("missing", ["none", "times", "components"])
@pytest.mark.parametrize("case", CASES)
def test_filter_smoother_and_evidence_equal_dense_conditioning(case: dict, missing: str) -> None:
    n, z, p = case["n"], case["z"], case["p"]
    tensors = _tensors(n, z, rank=case.get("rank"), fixed=case.get("fixed", False))
    chain = GaussianChain(*tensors)
    h, y = _rand(n + 1, p, z, seed=6), _rand(n + 1, p, seed=7)
    root = _rand(n + 1, p, p, seed=8)
    r = root @ root.mT + 0.1 * torch.eye(p, dtype=F64)
    keep = torch.ones(n + 1, p, dtype=torch.bool)
    mask = None
    if missing == "times":
        keep[::2] = False
        mask = keep[:, 0].clone()
    elif missing == "components":
        keep = _rand(n + 1, p, seed=9) > -0.3
        mask = keep
    data = torch.where(keep, y, torch.nan)
    mean, cov = _dense(*tensors)
    blocks_h, blocks_r = torch.block_diag(*h), torch.block_diag(*r)
    expected_mean, expected_cov, evidence = _condition(
        mean, cov, blocks_h, blocks_r, y.flatten(), keep.flatten()
    )

    smoothed = chain.smooth(data, h, r, mask)
    diagonal_blocks = expected_cov.reshape(n + 1, z, n + 1, z).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(smoothed.mean, expected_mean.reshape(n + 1, z), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(smoothed.cov, diagonal_blocks, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(smoothed.log_evidence, evidence, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chain.log_evidence(data, h, r, mask), evidence, rtol=1e-10, atol=1e-10)

    filtered = chain.filter(data, h, r, mask)
    for k in range(n + 1):
        for until, means, covs in (
            (k + 1, filtered.mean, filtered.cov),
            (k, filtered.predicted_mean, filtered.predicted_cov),
        ):
            past = keep & (torch.arange(n + 1) < until)[:, None]
            m, c, _ = _condition(mean, cov, blocks_h, blocks_r, y.flatten(), past.flatten())
            torch.testing.assert_close(means[k], m[k * z : (k + 1) * z], rtol=1e-9, atol=1e-10)
            own = slice(k * z, (k + 1) * z)
            torch.testing.assert_close(covs[k], c[own, own], rtol=1e-9, atol=1e-10)


def test_moments_equal_the_dense_joint_law() -> None:
    tensors = _tensors(6, 3, rank=2)
    mean, cov = GaussianChain(*tensors).moments()
    dense_mean, dense_cov = _dense(*tensors)
    torch.testing.assert_close(mean.flatten(), dense_mean)
    torch.testing.assert_close(cov, dense_cov.reshape(7, 3, 7, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1))


@pytest.mark.parametrize("shared", [True, False], ids=["shared-covariances", "batched-covariances"])
def test_a_batch_equals_its_members(shared: bool) -> None:
    batch, n, z, p = (2, 3), 4, 3, 2
    m0, p0, a, c, q = _tensors(n, z, batch)
    if shared:
        p0, a, q = p0[0, 0], a[:, 0, 0], q[:, 0, 0]
    h, y, r = _rand(p, z, seed=6), _rand(n + 1, *batch, p, seed=7), torch.eye(p, dtype=F64) * 0.3
    mask = torch.rand(n + 1, *(() if shared else batch)) > 0.3
    mask = mask.reshape(n + 1, *(mask.shape[1:] or (1, 1)))
    chain = GaussianChain(m0, p0, a, c, q)
    smoothed, filtered = chain.smooth(y, h, r, mask), chain.filter(y, h, r, mask)
    mean, cov = chain.moments()
    assert smoothed.mean.shape == mean.shape == (n + 1, *batch, z)
    assert smoothed.cov.shape == cov.shape == filtered.cov.shape == (n + 1, *batch, z, z)
    assert smoothed.log_evidence.shape == batch
    for i in range(2):
        for j in range(3):
            own = m0[i, j], p0 if shared else p0[i, j]
            steps = (a, c[:, i, j], q) if shared else (a[:, i, j], c[:, i, j], q[:, i, j])
            single = GaussianChain(*own, *steps)
            one = mask.expand(n + 1, *batch)[:, i, j]
            alone = single.smooth(y[:, i, j], h, r, one)
            torch.testing.assert_close(smoothed.mean[:, i, j], alone.mean)
            torch.testing.assert_close(smoothed.cov[:, i, j], alone.cov)
            torch.testing.assert_close(smoothed.log_evidence[i, j], alone.log_evidence)
            torch.testing.assert_close(filtered.mean[:, i, j], single.filter(y[:, i, j], h, r, one).mean)
            torch.testing.assert_close(mean[:, i, j], single.moments()[0])
            torch.testing.assert_close(cov[:, i, j], single.moments()[1])


def test_many_series_share_one_chain_without_batch_axes() -> None:
    chain = GaussianChain(*_tensors(4, 3))
    h, r, y = _rand(2, 3, seed=6), torch.eye(2, dtype=F64), _rand(5, 7, 2, seed=7)
    together = chain.smooth(y, h, r)
    for i in range(7):
        alone = chain.smooth(y[:, i], h, r)
        torch.testing.assert_close(together.mean[:, i], alone.mean)
        torch.testing.assert_close(together.log_evidence[i], alone.log_evidence)


def test_smoother_survives_collinear_states() -> None:
    """Two states that are equal up to 1e-9 make every predicted covariance numerically singular."""
    n = 200
    g = torch.tensor([[1.0], [1.0 + 1e-9], [0.5]], dtype=F64)
    a = torch.diag(torch.tensor([0.97, 0.97 - 1e-9, 0.5], dtype=F64)).expand(n, 3, 3)
    q = (0.1 * g @ g.T).expand(n, 3, 3)
    zero = torch.zeros(3, dtype=F64)
    chain = GaussianChain(zero, torch.zeros(3, 3, dtype=F64), a, zero.expand(n, 3), q)
    h, r, y = torch.ones(1, 3, dtype=F64), torch.full((1, 1), 0.01, dtype=F64), _rand(n + 1, 1, seed=3)
    smoothed = chain.smooth(y, h, r)
    mean, cov = _dense(zero, torch.zeros(3, 3, dtype=F64), a, zero.expand(n, 3), q)
    blocks = torch.block_diag(*h.expand(n + 1, 1, 3))
    expected, exp_cov, evidence = _condition(
        mean, cov, blocks, 0.01 * torch.eye(n + 1, dtype=F64), y[:, 0], torch.ones(n + 1, dtype=torch.bool)
    )
    torch.testing.assert_close(smoothed.mean, expected.reshape(n + 1, 3), rtol=1e-7, atol=1e-8)
    own = exp_cov.reshape(n + 1, 3, n + 1, 3).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(smoothed.cov, own, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(smoothed.log_evidence, evidence, rtol=1e-9, atol=1e-8)


def test_float32_keeps_its_dtype_and_agrees_with_float64() -> None:
    tensors = _tensors(50, 3)
    h, r, y = _rand(1, 3, seed=6), torch.full((1, 1), 0.2, dtype=F64), _rand(51, 1, seed=7)
    exact = GaussianChain(*tensors).smooth(y, h, r)
    single = GaussianChain(*(x.float() for x in tensors)).smooth(y.float(), h.float(), r.float())
    assert single.mean.dtype == torch.float32
    torch.testing.assert_close(single.mean.double(), exact.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(single.log_evidence.double(), exact.log_evidence, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_of_evidence_smoother_and_draws(p: int) -> None:
    n, z = 3, 2
    m0, p0, a, c, q = _tensors(n, z)
    h, y, r = _rand(p, z, seed=6), _rand(n + 1, p, seed=7), 0.3 * torch.eye(p, dtype=F64)
    mask = torch.tensor([True, False, True, True])
    inputs = [x.requires_grad_() for x in (m0, p0, a, c, q, y, h, r)]

    def sym(x: Tensor) -> Tensor:
        return 0.5 * (x + x.mT)

    def evidence(m0, p0, a, c, q, y, h, r):
        return GaussianChain(m0, sym(p0), a, c, sym(q)).log_evidence(y, h, sym(r), mask)

    def smoothed(m0, p0, a, c, q, y, h, r):
        s = GaussianChain(m0, sym(p0), a, c, sym(q)).smooth(y, h, sym(r), mask)
        return s.mean, s.cov

    def drawn(m0, p0, a, c, q, y, h, r):
        g = torch.Generator().manual_seed(0)
        return GaussianChain(m0, sym(p0), a, c, sym(q)).sample_posterior(2, y, h, sym(r), mask, generator=g)

    for function in (evidence, smoothed, drawn):
        assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(evidence, inputs)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_prior_draws_have_the_joint_moments(batch: tuple[int, ...]) -> None:
    n, z, draws = 3, 2, 40_000
    tensors = _tensors(n, z, batch, rank=1)
    x = GaussianChain(*tensors).sample(draws, generator=torch.Generator().manual_seed(1))
    assert x.shape == (draws, n + 1, *batch, z)
    for i in range(batch[0] if batch else 1):
        own = [t if not batch else (t[i] if k < 2 else t[:, i]) for k, t in enumerate(tensors)]
        mean, cov = _dense(*own)
        flat = (x[:, :, i] if batch else x).reshape(draws, -1)
        _assert_moments(flat, mean, cov)


def test_posterior_draws_have_the_joint_posterior_moments() -> None:
    n, z, p, draws = 3, 3, 2, 40_000
    tensors = _tensors(n, z, rank=1, fixed=True)
    chain = GaussianChain(*tensors)
    h, y, r = _rand(p, z, seed=6), _rand(n + 1, p, seed=7), torch.tensor([[0.4, 0.1], [0.1, 0.3]], dtype=F64)
    keep = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    x = chain.sample_posterior(draws, y, h, r, keep, generator=torch.Generator().manual_seed(2))
    mean, cov = _dense(*tensors)
    blocks = torch.block_diag(*h.expand(n + 1, p, z)), torch.block_diag(*r.expand(n + 1, p, p))
    expected = _condition(mean, cov, *blocks, y.flatten(), keep.flatten())
    _assert_moments(x.reshape(draws, -1), expected[0], expected[1])


def _assert_moments(x: Tensor, mean: Tensor, cov: Tensor) -> None:
    """Sample mean and covariance within 5 of their own standard errors (a false alarm in about 1e4 runs)."""
    draws, var = x.shape[0], cov.diagonal().clamp_min(0)
    assert ((x.mean(0) - mean).abs() <= 5 * (var / draws).sqrt() + 1e-9).all()
    centred = x - mean
    sample_cov = centred.T @ centred / draws
    stderr = ((var[:, None] * var + cov**2) / draws).sqrt()
    assert ((sample_cov - cov).abs() <= 5 * stderr + 1e-9).all()


def test_posterior_draws_of_batched_series_are_centred_on_the_smoother() -> None:
    chain = GaussianChain(*_tensors(3, 2))
    h, r, y = _rand(1, 2, seed=6), torch.full((1, 1), 0.2, dtype=F64), _rand(4, 3, 1, seed=7)
    smoothed = chain.smooth(y, h, r)
    x = chain.sample_posterior(20_000, y, h, r, generator=torch.Generator().manual_seed(3))
    assert x.shape == (20_000, 4, 3, 2)
    stderr = (smoothed.cov.diagonal(dim1=-2, dim2=-1) / 20_000).sqrt()
    assert ((x.mean(0) - smoothed.mean).abs() <= 5 * stderr).all()


def test_draws_follow_the_generator() -> None:
    chain = GaussianChain(*_tensors(3, 2))
    first, again = (chain.sample(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, chain.sample(2, torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_psd_factor_reproduces_matrices_of_any_rank(rank: int) -> None:
    root = _rand(4, 5, rank, seed=1) * torch.logspace(0, -4, rank, dtype=F64)
    matrix = root @ root.mT
    factor = psd_factor(matrix)
    torch.testing.assert_close(factor @ factor.mT, matrix, rtol=0, atol=2e-14 * float(matrix.abs().max() + 1))
    assert int((factor.abs().sum(-2) > 0).sum(-1).max()) <= rank


def _valid() -> dict:
    m0, p0, a, c, q = _tensors(3, 2)
    return {"initial_mean": m0, "initial_cov": p0, "transition": a, "offset": c, "noise_cov": q}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"transition": torch.zeros(3, 2, 3, dtype=F64)}, ShapeError, "transition"),
        ({"offset": torch.zeros(2, 2, dtype=F64)}, ShapeError, "offset"),
        ({"initial_cov": torch.zeros(3, 3, dtype=F64)}, ShapeError, "initial_cov"),
        ({"noise_cov": torch.zeros(2, 2, dtype=F64)}, ShapeError, "noise_cov"),
        ({"offset": torch.full((3, 2), torch.nan, dtype=F64)}, NonFiniteError, r"offset\[0, 0\]"),
        ({"offset": torch.zeros(3, 2)}, DtypeMismatchError, "offset torch.float32"),
        (
            {"offset": torch.zeros(3, 4, 2, dtype=F64), "initial_mean": torch.zeros(3, 2, dtype=F64)},
            ShapeError,
            "batch",
        ),
    ],
)
def test_bad_chains_are_rejected(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GaussianChain(**{**_valid(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.zeros(3, 1, dtype=F64)}, ShapeError, "y has the wrong shape"),
        ({"y": torch.full((4, 1), torch.inf, dtype=F64)}, NonFiniteError, "y must be finite"),
        ({"y": torch.zeros(4, 1)}, DtypeMismatchError, "y torch.float32"),
        ({"emission": torch.zeros(1, 3, dtype=F64)}, ShapeError, "emission"),
        ({"obs_cov": torch.zeros(2, 2, dtype=F64)}, ShapeError, "obs_cov"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ShapeError, "mask"),
        ({"mask": torch.ones(4)}, ShapeError, "mask must be a boolean"),
        (
            {"emission": torch.zeros(1, 2, dtype=F64), "obs_cov": torch.zeros(1, 1, dtype=F64)},
            SingularDiffusionError,
            "observation 0",
        ),
    ],
)
def test_bad_observations_are_rejected(change: dict, error: type[Exception], message: str) -> None:
    valid = {
        "y": torch.zeros(4, 1, dtype=F64),
        "emission": torch.ones(1, 2, dtype=F64),
        "obs_cov": torch.ones(1, 1, dtype=F64),
    }
    with pytest.raises(error, match=message):
        GaussianChain(**_valid()).log_evidence(**{**valid, **change})


def test_nan_is_a_missing_value() -> None:
    one = torch.ones(3, 1, 1, dtype=F64)
    chain = GaussianChain(one[0, 0], one[0], 0.5 * one, one[..., 0], one)
    y = torch.tensor([[0.3], [torch.nan], [1.0], [0.2]], dtype=F64)
    masked = chain.filter(y.nan_to_num(7.0), one[0], one[0], ~y[:, 0].isnan())
    torch.testing.assert_close(chain.filter(y, one[0], one[0]).mean, masked.mean)
    assert chain.log_evidence(y, one[0], one[0]) == masked.log_evidence
