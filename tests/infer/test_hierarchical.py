"""The guide that follows plates: its map, its structure, its start, and a funnel whose posterior is known."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.infer import AutoHierarchicalNormal, fit_posterior, start_at_mode
from stochdyn.infer.panel import Panel
from tests.infer.exact import F64

ZERO = torch.zeros((), dtype=F64)
Y = torch.tensor([2.1, -1.9, 0.3, 1.2, -0.4, 3.0], dtype=F64)


def nested() -> None:
    pyro.sample("a", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    outer, inner = pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 4, dim=-2)
    with outer:
        pyro.sample("b", dist.LogNormal(ZERO, 1.0))
        pyro.sample("c", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
    with outer, inner:
        pyro.sample("d", dist.Normal(ZERO, 1.0))


def moved() -> AutoHierarchicalNormal:
    """Return a guide whose parameters are all away from their start."""
    guide = AutoHierarchicalNormal(nested)
    guide()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return guide


def test_the_map_inverts_and_knows_its_slope():
    guide = moved()
    law = guide.get_posterior()
    e = torch.randn(5, guide.latent_dim, dtype=F64, generator=torch.Generator().manual_seed(2))
    u = law.transform(e)
    torch.testing.assert_close(law.transform.inv(u), e)
    jacobian = torch.autograd.functional.jacobian(law.transform, e[0])
    wanted = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(law.transform.log_abs_det_jacobian(e, u)[0], wanted)
    normal = dist.Normal(ZERO, 1.0).log_prob(e).sum(-1)
    torch.testing.assert_close(law.log_prob(u), normal - law.transform.log_abs_det_jacobian(e, u))


def test_the_wide_share_is_part_of_the_density():
    guide = moved()
    guide.wide_share = 0.2
    law = guide.get_posterior()
    pyro.set_rng_seed(0)
    u = law.rsample((20000,)).detach()
    e = law.transform.inv(u).detach()
    # Shared values have variance 0.8 + 0.2 * 2.5^2 = 2.05 and fourth moment 3 (0.8 + 0.2 * 2.5^4), members variance 1.
    variance = e.var(0)
    shared = guide.groups[0].index[0]
    error = ((3 * (0.8 + 0.2 * 2.5**4) - 2.05**2) / 20000) ** 0.5
    assert bool(((variance[shared] - 2.05).abs() < 5 * error).all())
    assert bool(((variance[guide.groups[1].index.flatten()] - 1).abs() < 5 * (2 / 20000) ** 0.5).all())
    # The mean of p/q over q is one for every p: here for the guide without its wide share.
    guide.wide_share = 0.0
    ratio = torch.exp(guide.get_posterior().log_prob(u) - law.log_prob(u)).detach()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 20000**0.5


def test_members_depend_on_what_they_share_and_on_nothing_else():
    guide = moved()
    first, second, third = guide.groups
    assert [g.index.shape for g in guide.groups] == [(1, 2), (3, 3), (12, 1)]
    jacobian = torch.autograd.functional.jacobian(
        guide.get_posterior().transform, torch.zeros(guide.latent_dim, dtype=F64)
    )
    touched = jacobian.abs() > 0
    for member in range(3):
        own, others = second.index[member], second.index[[k for k in range(3) if k != member]].flatten()
        assert bool(touched[own][:, first.index.flatten()].all())
        assert not bool(touched[own][:, others].any())
    # An inner member sees its own outer member alone.
    place = third.index.reshape(3, 4) if third.parents[1][1][1] == 0 else third.index.reshape(4, 3).T
    for member in range(3):
        seen = touched[place[member]][:, second.index.flatten()].reshape(4, 3, 3)
        assert bool(seen[:, member].all())
        assert not bool(seen[:, [k for k in range(3) if k != member]].any())


def test_it_starts_at_a_normal_law_that_has_the_structure():
    guide = moved()
    reference = moved()
    with torch.no_grad():
        for own in (guide, reference):
            for law in own._laws():
                law.skew.zero_()
        for law in reference._laws():
            if law.inputs:
                law.bend.zero_()
    at = torch.zeros(guide.latent_dim, dtype=F64)
    linear = torch.autograd.functional.jacobian(reference.get_posterior().transform, at)
    wanted = linear @ linear.T
    with torch.no_grad():
        for law in guide._laws():
            if law.inputs:
                law.bend.zero_()
    guide.start_at(torch.arange(guide.latent_dim, dtype=F64), wanted)
    found = torch.autograd.functional.jacobian(guide.get_posterior().transform, at)
    torch.testing.assert_close(found @ found.T, wanted)
    torch.testing.assert_close(guide.loc.detach(), torch.arange(guide.latent_dim, dtype=F64))


def funnel(y):
    spread = pyro.sample("spread", dist.HalfNormal(torch.ones((), dtype=F64)))
    with pyro.plate("member", len(y)):
        effect = pyro.sample("effect", dist.Normal(ZERO, 1.0))
        pyro.sample("y", dist.Normal(spread * effect, 1.0), obs=y)


def exact_spread():
    grid = torch.linspace(1e-4, 6, 4001, dtype=F64)
    logs = dist.Normal(ZERO, (1 + grid[:, None] ** 2).sqrt()).log_prob(Y).sum(-1) - 0.5 * grid**2
    weight = torch.softmax(logs, 0)
    mean = float(weight @ grid)
    return mean, float(weight @ (grid - mean) ** 2) ** 0.5, logs


def test_a_funnel_comes_out_right():
    post = fit_posterior(funnel, Y, num_draws=2000, progress=False)
    mean, sd, logs = exact_spread()
    draws = torch.as_tensor(post.idata.posterior["spread"].values).flatten()
    assert post.khat < 0.7
    # Four errors of the mean and of the spread of as many draws as the weights are worth.
    assert abs(float(draws.mean()) - mean) < 4 * sd / post.ess**0.5
    assert abs(float(draws.std()) / sd - 1) < 4 / post.ess**0.5
    step = float(6 / 4000)
    evidence = float(torch.logsumexp(logs, 0)) + torch.tensor(step * (2 / torch.pi) ** 0.5).log()
    assert abs(post.log_evidence - float(evidence)) < 0.2


def test_the_mode_of_a_model_without_paths():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(ZERO, 10.0))
        pyro.sample("y", dist.Normal(mean[..., None].expand(*mean.shape, len(y)), 1.0).to_event(1), obs=y)

    guide = AutoHierarchicalNormal(model)
    mode = start_at_mode(guide, Y)
    torch.testing.assert_close(mode[0], Y.sum() / (len(Y) + 0.01), rtol=1e-3, atol=0)


def test_a_panel_names_the_axes_of_the_answer():
    panel = Panel.from_arrays([[0.0, 1.0], [0.0, 2.0]], [[0.1, 0.2], [0.4, 0.5]], series=["left", "right"])

    def model(panel):
        with pyro.plate(panel.series_name, len(panel)):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample(
                "y",
                dist.Normal(mean[..., None], 0.5).expand([*mean.shape, 2]).to_event(1),
                obs=panel.values[..., 0],
            )

    post = fit_posterior(model, panel, method="laplace", num_draws=100, progress=False)
    assert post.idata.posterior["mean"].dims == ("chain", "draw", "series")
    assert post.idata.posterior["series"].values.tolist() == ["left", "right"]
    assert post.idata.prior["mean"].shape[2:] == (2,)
    assert post.idata.prior_predictive["y"].shape[2:] == (2, 2)


@pytest.mark.parametrize("options", [{"init_scale": 0.0}, {"hidden": 0}])
def test_bad_widths_are_refused(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))):
        AutoHierarchicalNormal(nested, **options)
