"""The linear model in feature space: gradients, streaming, and the dense density."""

from __future__ import annotations

import torch

from stochdyn.vectorfields.regression import accumulate, log_evidence, weight_posterior


def problem(rows: int = 30, k: int = 7, fields: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, fields, generator=generator, dtype=torch.float64)
    relative = 0.5 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return phi, y, relative, 0.1 + torch.rand(k, generator=generator, dtype=torch.float64)


def test_gradients() -> None:
    phi, y, relative, s = problem()
    stats = accumulate([(phi, y, relative)])
    s.requires_grad_()
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, noise: log_evidence(stats, s, noise), (s, noise))


def test_evidence_and_posterior_are_dense() -> None:
    phi, y, relative, s = problem()
    stats = accumulate([(phi, y, relative)])
    noise = torch.tensor(0.3, dtype=torch.float64)
    covariance = phi @ torch.diag(s) @ phi.T + torch.diag(0.3 * relative)
    law = torch.distributions.MultivariateNormal(torch.zeros(30).double(), covariance)
    torch.testing.assert_close(log_evidence(stats, s, noise), law.log_prob(y.T).sum())
    precision = torch.diag(1 / s) + phi.T @ torch.diag(1 / (0.3 * relative)) @ phi
    posterior = weight_posterior(stats, s, noise)
    torch.testing.assert_close(posterior.root @ posterior.root.T, torch.linalg.inv(precision))
    torch.testing.assert_close(
        posterior.mean, torch.linalg.solve(precision, phi.T @ (y / (0.3 * relative)[:, None]))
    )


def test_data_in_parts_are_the_data() -> None:
    phi, y, relative, _ = problem()
    whole = accumulate([(phi, y, relative)])
    parts = accumulate((phi[i : i + 7], y[i : i + 7], relative[i : i + 7]) for i in range(0, 30, 7))
    assert parts.rows == whole.rows == 30
    for name in ("gram", "cross", "square", "log_relative"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_weights_without_prior_variance_stay_zero() -> None:
    phi, y, relative, s = problem()
    s[2] = 0.0
    posterior = weight_posterior(accumulate([(phi, y, relative)]), s, torch.tensor(0.3).double())
    assert (posterior.mean[2] == 0).all()
    assert (posterior.root[2] == 0).all()
