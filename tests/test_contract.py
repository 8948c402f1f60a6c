"""The public names that programs outside call, each used once as they use it, on small sizes."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import stochdyn as sd


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Field(nn.Module):
    """A small network of time and state, as users write it."""

    def __init__(self, dim: int, out: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 16), nn.Tanh(), nn.Linear(16, out or dim))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, t.expand_as(x[..., :1])], -1))


def test_core() -> None:
    ts = torch.linspace(0, 1, 11)
    for diffusion in (
        0.5,
        torch.tensor([0.5, 1.0]),
        torch.eye(2),
        sd.Scalar(0.3),
        lambda t, x: sd.Diagonal(1 + x**2),
    ):
        sde = sd.SDE(lambda t, x: -x, diffusion, noise=None)
        assert sd.DiffusionMeasure(torch.zeros(2), sde).sample(ts, (3,)).x.shape == (3, 11, 2)
    sde = sd.SDE(lambda t, x: -x, 0.5)
    P = sd.DiffusionMeasure(dist.Normal(torch.zeros(1), 1.0).to_event(1), sde)
    path = P.sample(ts, sample_shape=(100,), generator=seeded())
    assert (path.ts.shape, path.x.shape, path.dw.shape) == ((11,), (100, 11, 1), (100, 10, 1))
    Q = P.controlled(lambda t, x: 1.0 - x)
    for estimator in ("density", "rate", "stl"):
        assert Q.log_rn(path, P, estimator=estimator).shape == (100,)
    estimate = Q.kl(P, ts, num_samples=64, generator=seeded())
    assert estimate.stderr > 0
    assert P.log_prob(path).shape == (100,)
    assert isinstance(P.reverse(lambda t, x: -x), sd.DiffusionMeasure)
    lin = sd.LinearGaussianMeasure.ornstein_uhlenbeck(torch.tensor(1.0))
    assert lin.mean(ts).shape == (11, 1)
    assert lin.covariance(ts).shape[-1] == lin.covariance(ts).shape[-2]
    y = torch.zeros(3, 1)
    assert lin.log_evidence(ts[[2, 5, 8]], y, 0.2).shape == ()
    assert lin.posterior(ts[[2, 5, 8]], y, 0.2).mean.shape[-1] == 1
    flow = sd.GaussianFlow.from_measure(lin)
    assert isinstance(flow, sd.MarginalFlow)
    x = flow.sample(torch.tensor(0.5), 7)
    assert flow.log_prob(0.5, x).shape == (7,)
    assert flow.score(0.5, x).shape == (7, 1)
    assert flow.residual(0.5, x, sd.FokkerPlanck(sd.SDE(lambda t, x: -x, 2**0.5))).shape == (7,)


def test_objectives_and_fit(tmp_path: Any) -> None:
    class Square(sd.Objective):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(()))

        def forward(self, batch: Any = None) -> sd.ObjectiveValue:
            return sd.ObjectiveValue(self.p.square(), {"p": self.p.detach()}, "surrogate")

    result = sd.fit(
        Square(),
        None,
        steps=5,
        lr=1e-3,
        batch_size=None,
        seed=0,
        device=None,
        progress=False,
        checkpoint=tmp_path,
        resume=False,
        callbacks=(),
    )
    assert len(result.losses) == 5
    assert result.seconds > 0
    assert isinstance(result.objective, Square)
    ts = torch.linspace(0, 1, 6)
    prior = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(lambda t, x: -x, 1.0))
    likelihood = sd.GaussianObservations(ts, ts[[2, 5]], torch.tensor([0.1, 0.2]), 0.3)
    elbo = sd.PathELBO(prior, prior.controlled(Field(1)), likelihood, num_particles=8, estimator="auto")
    assert elbo(None).bound == "evidence_lower"


def test_pyro_and_arviz() -> None:
    ts = torch.linspace(0, 1, 11)

    def model(ts: Tensor, y: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        x = sd.infer.sample_path("x", sd.SDE(lambda t, x: -rate[..., None] * x, 1.0), torch.zeros(1), ts)
        pyro.sample("y", dist.Normal(x[..., [3, 7], 0], 0.3).to_event(1), obs=y)

    y = torch.tensor([0.3, -0.2])
    pyro.sample("alone", sd.infer.DiffusionPath(sd.SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts))
    pyro.poutine.trace(pyro.poutine.reparam(model, {"x": sd.infer.NoiseReparam()})).get_trace(ts, y)
    guide = sd.infer.AutoPathGuide(model)
    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.01}),
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0),
    )
    svi.step(ts, y)
    idata = sd.to_inference_data(model, guide, args=(ts, y), num_draws=50, coords=None, dims=None, seed=0)
    assert {"posterior", "observed_data", "log_likelihood", "sample_stats", "posterior_predictive"} <= set(
        idata.groups() if callable(getattr(idata, "groups", None)) else [g.strip("/") for g in idata.groups]
    )
    assert {"lp", "log_q", "log_weight"} <= set(idata.sample_stats.data_vars)
    assert idata.attrs["inference_library"] == "stochdyn"
    assert isinstance(float(sd.infer.khat(model, guide, args=(ts, y), num_draws=100)), float)


def test_fractional() -> None:
    noise = sd.fractional.MarkovNoise(0.3, num_states=6, horizon=1.0, dt=0.01, kind="II", learn_hurst=True)
    assert noise.speeds.shape == noise.weights.shape == (6,)
    assert 0 < noise.relative_error < 0.1
    assert sd.fractional.sample_fbm(0.7, 20, horizon=1.0, sample_shape=(3,), generator=seeded()).shape == (
        3,
        21,
    )
    ts = torch.linspace(0, 1, 5)
    assert sd.fractional.fbm_covariance(ts, 0.3, kind="I").shape == (5, 5)
    ou = sd.fractional.FractionalOU(1.0, 0.0, 0.5, 0.7, noise=None)
    y = torch.randn(4, generator=seeded())
    assert ou.log_evidence(ts[1:], y, 0.2).isfinite()
    assert ou.posterior(ts[1:], y, 0.2).mean.shape[-1] >= 1
    idata = sd.fractional.infer_hurst(
        sd.fractional.sample_fgn(0.7, 60, generator=seeded()), dt=1.0, num_draws=100, seed=0
    )
    assert {"hurst", "mean", "scale"} <= set(idata.posterior.data_vars)
    assert sd.fractional.VideoModel is not None


@pytest.mark.parametrize(
    "path", ["linear", "trig", "encoder-decoder", "one-sided-linear", "one-sided-trig", "vp", "mirror"]
)
def test_every_interpolant_path(path: str) -> None:
    it = sd.interpolants.Interpolant(path=path, gamma="brownian", scale=1.0)
    t, x = torch.full((5, 1), 0.3), torch.randn(5, 2)
    assert it.sample(t, x, x + 1, torch.randn(5, 2)).shape == (5, 2)


def test_interpolants() -> None:
    it = sd.interpolants.Interpolant(path="linear", gamma="brownian", scale=1.0)
    assert torch.as_tensor(it.alpha(torch.tensor(0.25))).item() == pytest.approx(0.75)
    mixture = sd.interpolants.GaussianMixture
    base = mixture(torch.ones(1), torch.zeros(1, 2), 1.0)
    target = mixture(torch.tensor([0.5, 0.5]), torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 0.25)
    truth = sd.interpolants.GaussianMixtureInterpolant(it, base, target)
    assert isinstance(truth, sd.MarginalFlow)
    x = torch.randn(6, 2)
    for name in ("velocity", "score", "noise_prediction"):
        assert getattr(truth, name)(0.4, x).shape == (6, 2)
    assert truth.log_prob(0.4, x).shape == (6,)
    x0, x1 = torch.randn(64, 2), torch.randn(64, 2) + 1
    for coupling in ("independent", "ot", "entropic"):
        obj = sd.interpolants.InterpolantRegression(
            it, velocity=Field(2), noise_prediction=Field(2), coupling=coupling, reuse=1
        )
        sd.fit(obj, (x0, x1), steps=2, batch_size=32, progress=False)
    gen = obj.generator()
    assert gen.push(x0, num_steps=5).shape == (64, 2)
    assert gen.log_prob(x1[:4], exact=True).shape == (4,)
    for epsilon in (0.5, lambda t: 0.1 * (1 - t)):
        assert isinstance(gen.measure(epsilon=epsilon), sd.DiffusionMeasure)
    for method in ("heun", "euler", "strang"):
        assert gen.sample(8, epsilon=0.5, num_steps=5, method=method).shape == (8, 2)
    assert float(torch.as_tensor(getattr(obj.kl_bound(x0, x1, 0.5), "mean", obj.kl_bound(x0, x1, 0.5)))) >= 0
    law = gen.distribution()
    assert law.log_prob(law.sample((3,))).shape == (3,)


def test_score_diffusion() -> None:
    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Field(2, 1)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(t, x).squeeze(-1)

    data = torch.randn(64, 2)
    for process in (sd.interpolants.OU(), sd.interpolants.VP(), sd.interpolants.VE()):
        for residual in ("exact", "hutchinson"):
            diff = sd.interpolants.ScoreMatching(
                process, potential=Potential(), fp_weight=0.01, residual=residual
            )
            sd.fit(diff, data, steps=2, batch_size=16, progress=False)
        rev = diff.generator()
        for method in ("sde", "ode"):
            assert rev.sample(8, method=method, num_steps=5).shape == (8, 2)
        assert diff.fokker_planck_residual(torch.full((4, 1), 0.5), data[:4]).shape[0] == 4
    gap = sd.interpolants.ode_sde_gap(rev, 32)
    assert float(getattr(gap, "w2", gap) if not isinstance(gap, float) else gap) >= 0


def test_vectorfields() -> None:
    torch.manual_seed(0)
    points = nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64), dim=-1)
    cloud = sd.vectorfields.PointCloud(points, num_neighbors=10, dim=None)
    assert cloud.dim == 2
    assert cloud.frames.shape == (200, 3, 2)
    assert cloud.is_orientable
    assert cloud.is_connected
    assert cloud.connections is not None
    evals, evecs = cloud.spectrum(20, kind="connection")
    assert (evals.shape, evecs.shape[-1]) == ((20,), 20)
    kernel = sd.vectorfields.ConnectionMatern(cloud, nu=1.5, num_eigenpairs=50)
    import gpytorch

    assert isinstance(kernel, gpytorch.kernels.Kernel)
    vectors = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(200, 3), points)
    index = torch.arange(0, 200, 2)
    for choice in ("connection", "projected", "ambient", kernel):
        gp = sd.vectorfields.RVGP(cloud, kernel=choice, backend="spectral")
        gp.fit(index, vectors[index])
        mean, var = gp.predict(torch.arange(200))
        assert mean.shape == (200, 3)
        assert var.shape == (200, 2, 2)
    gp = sd.vectorfields.RVGP(cloud, kernel="connection", backend="precision")
    gp.fit(index, vectors[index])
    gp = sd.vectorfields.RVGP(cloud)
    gp.fit(index, torch.stack([vectors[index], 2 * vectors[index]]))
    assert gp.predict(torch.arange(5))[0].shape == (2, 5, 3)
    gp.fit(index, vectors[index])
    new = nn.functional.normalize(torch.randn(7, 3, dtype=torch.float64), dim=-1)
    assert gp.predict(new)[0].shape == (7, 3)
    assert gp.sample(3).shape[0] == 3
    assert torch.as_tensor(gp.log_marginal_likelihood()).isfinite()
    sde = sd.SDE(gp.as_drift(), 0.1)
    ts = torch.linspace(0, 0.5, 6, dtype=torch.float64)
    paths = sd.DiffusionMeasure(points[0], sde).sample(ts, (4,))
    assert paths.x.shape == (4, 6, 3)
    gp.fit_paths(paths)
    gp.predict(torch.arange(5))


# Three small clouds can't tell a rotation from rest, as the library says.
@pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
def test_bridges() -> None:
    samples = [torch.randn(20 + i, 2, generator=seeded(i)) + 0.3 * i for i in range(3)]
    snaps = sd.bridges.Snapshots([0.0, 0.5, 1.2], samples, weights=None)
    families = (
        sd.bridges.LinearDrift(2),
        sd.bridges.FeatureDrift(lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1), 2),
        sd.bridges.NeuralDrift(2, 16),
        Field(2),
    )
    for family in families:
        fit = sd.bridges.refine(snaps, family, diffusion=1.0, max_iterations=2, dt=0.1, seed=0)
    fit = sd.bridges.refine(
        snaps, families[0], diffusion=1.0, max_iterations=2, dt=0.1, seed=0, learn_diffusion=False
    )
    assert all(isinstance(v, Tensor) for v in fit.parameters.values())
    assert len(fit.history) >= 1
    ts = torch.linspace(0, 1.2, 7)
    assert isinstance(fit.measure, sd.PathMeasure)
    fit.measure.sample(ts, 5)
    assert fit.measure.marginal(0.7).sample(6).shape == (6, 2)
    assert isinstance(fit.reference, sd.DiffusionMeasure)
    idata = fit.posterior(8)
    assert len(idata.posterior.data_vars) >= 1
    prey = sd.datasets.lotka_volterra(num_particles=20, times=[0.0, 0.5, 1.0])
    sd.bridges.refine(
        sd.bridges.Snapshots(prey.times, prey.samples),
        sd.bridges.LotkaVolterra(),
        diffusion=0.1,
        max_iterations=1,
    )
    plan = sd.sinkhorn(samples[0], samples[1], 0.5, weights_x=None, weights_y=None, cost=None, tolerance=1e-6)
    assert plan.plan().shape == (20, 21)
    assert plan.marginal_error < 1e-5
    assert len(plan.potentials) == 2
    assert sd.bridges.sinkhorn is sd.sinkhorn
    bridge = sd.bridges.SchrodingerBridge(snaps, None)
    bridge.solve()
    exact = sd.bridges.GaussianBridge(
        torch.zeros(2), torch.eye(2), torch.ones(2), torch.eye(2), 1.0, 1.0, drift_matrix=None
    )
    assert exact.coupling is not None
    exact.marginal(0.5)
    assert exact.drift(0.5, torch.zeros(3, 2)).shape == (3, 2)
    assert sd.diagnostics.emd(samples[0], samples[1], p=2) > 0


def test_povm(tmp_path: Any) -> None:
    povm = sd.povm.Tetrahedral(rotated=True)
    assert povm.effects.shape == (4, 2, 2)
    assert povm.overlap.shape == (4, 4)
    assert povm.dual.shape == (4, 2, 2)
    assert sd.povm.FourPauli().effects.shape == (4, 2, 2)
    terms = [(1.0, "ZZ", (i, (i + 1) % 3)) for i in range(3)] + [(0.5, "X", (i,)) for i in range(3)]
    model = sd.povm.Lindbladian(3, hamiltonian=terms, jumps=[(1.0, "sigma-", (i,)) for i in range(3)])
    operator = model.master_operator(povm)
    p = torch.full((64,), 1 / 64, dtype=torch.float64)
    assert operator.apply(p).shape == (64,)
    configurations, rates = operator.connected(torch.zeros(2, 3, dtype=torch.long))[:2]
    assert (configurations.shape[-1], rates.numel() > 0) == (3, True)
    for strings in (None, "translations"):
        net = sd.povm.AutoregressiveTransformer(3, layers=1, width=8, heads=2, strings=strings)
        net.set_product_state(povm, "up")
        a, logp = net.sample(16, generator=seeded())
        assert a.shape == (16, 3)
        torch.testing.assert_close(net.log_prob(a), logp, rtol=1e-4, atol=1e-4)
    sd.povm.AutoregressiveTransformer(4, layers=1, width=8, heads=2, strings="snake")
    times = torch.linspace(0, 0.1, 3, dtype=torch.float64)
    observables = {"z": "Z", "zz": ("ZZ", (0, 1))}
    for method in ("tdvp", "trapezoid", "fit"):
        net = sd.povm.AutoregressiveTransformer(3, layers=1, width=8, heads=2)
        net.set_product_state(povm, "up")
        run = sd.povm.evolve(
            net, model, povm, times, method=method, num_samples=None, observables=observables
        )
        assert run.times.shape == (3,)
        assert run.expect["z"].shape[0] == run.stderr["z"].shape[0] == 3
        assert run.residual is not None
    law = net.distribution()
    assert law.log_prob(law.sample((5,))).shape == (5,)
    exact = sd.povm.exact.evolve(model, "up", times, observables)
    assert exact is not None
    assert callable(sd.povm.steady_state)


def test_jumps() -> None:
    rates = torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.0, 0.7], [0.2, 0.4, 0.0]], dtype=torch.float64)
    Q = sd.jumps.RateMatrix(rates)
    for answer, shape in (
        (Q.matrix, (3, 3)),
        (Q.stationary(), (3,)),
        (Q.relaxation_times(), (2,)),
        (Q.mean_first_passage(), (3, 3)),
        (Q.entropy_production(), ()),
        (sd.jumps.transition(Q, 0.5), (3, 3)),
        (sd.jumps.transition(Q, torch.tensor([0.5, 1.0])), (2, 3, 3)),
    ):
        assert answer.shape == shape
    law = sd.jumps.JumpMeasure([1.0, 0.0, 0.0], Q)
    path = law.sample(torch.linspace(0, 1, 5), 10, seeded())
    assert law.marginal(0.3).probs.shape == (3,)
    assert law.log_rn(path, law).shape == (10,)
    assert float(law.kl(law, 1.0)) == pytest.approx(0.0)
    law.forward()
    record = law.sample_record(2.0, (5,), seeded())
    assert record.at([0.0, 1.0]).shape == (5, 2)
    assert (record.dwell.shape, record.counts.shape) == ((5, 3), (5, 3, 3))
    assert record.times.shape[:1] == record.states.shape[:1] == (5,)
    confusion = [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]]
    times = [0.0, 0.5, 1.0]
    for y, observation in (
        ([0, 1, 2], sd.jumps.Exact(3)),
        ([0, 1, 2], sd.jumps.Misclassified(confusion)),
        ([0.1, 1.2, 1.9], sd.jumps.GaussianLevels([0.0, 1.0, 2.0], 0.3)),
        ([3, 4, 9], sd.jumps.PoissonLevels([1.0, 4.0, 8.0])),
        ([0, 1, 0], sd.jumps.StateSets([[0, 1], [2]], 3)),
        ([0, 1, 2], sd.jumps.ExactEntry([2], sd.jumps.Exact(3))),
    ):
        evidence = sd.jumps.log_evidence(law, times, y, observation)
        post = law.conditioned(times, y, observation)
        assert post.marginal(0.2).probs.shape == (3,)
        assert post.rates(0.2).shape == (3, 3)
        assert post.sample([0.0, 0.3], 4).x.shape == (4, 2, 1)
        site = sd.jumps.HiddenJumps(law, times, observation).log_prob(torch.as_tensor(y))
        torch.testing.assert_close(site, evidence)


def test_panels_and_reactions_of_jumps() -> None:
    pandas = pytest.importorskip("pandas")
    law = sd.jumps.JumpMeasure([0.5, 0.5], [[0.0, 1.0], [0.5, 0.0]])
    state = law.sample(torch.linspace(0, 3, 7), 20, seeded()).x.long().flatten().tolist()
    frame = pandas.DataFrame(
        {
            "id": [i for i in range(20) for _ in range(7)],
            "years": [0.5 * k for k in range(7)] * 20,
            "state": state,
        }
    )
    panel = sd.jumps.PanelData(frame, subject="id", time="years", state="state", exact_entry=[])
    mask = ~torch.eye(2, dtype=torch.bool)
    for options in ({}, {"mask": mask, "prior": (0.0, 1.0)}, {"reversible": True}):
        fit = sd.jumps.fit_rates(panel, **options)
        assert fit.rates.shape == (2, 2)
        assert fit.log_likelihood < 0
        assert isinstance(fit.khat, float)
        assert len(fit.draws) > 0
        assert fit.idata is not None
        assert isinstance(fit.report(), str)
    assert sd.jumps.AmortisedRates.load().posterior(panel).rates.shape == (2, 2)
    net = sd.jumps.ReactionNetwork(["0 -> A", "A -> 0"], rates=[3.0, 0.5], initial={"A": 7})
    assert net.sample([0.0, 1.0], 1000).x.shape == (1000, 2, 1)
    truncated = net.truncate({"A": 200}).marginal(1.0)
    assert truncated.lost_mass < 1e-12
    assert truncated.probs.shape == (201,)
    assert isinstance(net.linear_noise(), sd.LinearGaussianMeasure)
    assert isinstance(net.langevin(), sd.SDE)


def test_nonequilibrium() -> None:
    ne = sd.nonequilibrium
    drift = torch.tensor([[-1.0, 0.5], [-0.5, -1.0]], dtype=torch.float64)
    steady = ne.LinearSteadyState(drift, torch.eye(2, dtype=torch.float64), parity=None)
    x = steady.sample(200, seeded())
    assert (steady.covariance.shape, steady.velocity(x).shape, steady.local(x).shape) == (
        (2, 2),
        (200, 2),
        (200,),
    )
    assert float(steady.rate) > 0
    assert steady.split is not None
    current = ne.SteadyCurrent(steady.sde, steady.score, parity=None)
    for field in (current.velocity, current.irreversible):
        assert field(x).shape == (200, 2)
    for number in (lambda x: current.local(x, by=None), current.medium, current.system):
        assert number(x).shape == (200,)
    assert ne.entropy_production_rate(current, x).stderr >= 0
    assert ne.sum_rule(steady.sde, x, parity=None).stderr >= 0
    objective = ne.SteadyScoreMatching(steady.sde, ne.SteadyScore(x), fp_weight=1.0)
    sd.fit(objective, x, steps=2, progress=False)
    paths = steady.law.sample(torch.linspace(0, 10, 501, dtype=torch.float64), 20, seeded())
    assert ne.short_time_entropy(paths.x, 0.02, features="linear", lags=(1, 2), folds=2).stderr > 0
    spent = ne.dissipation(paths.x, paths.ts, current)
    assert spent.shape == (20,)
    ne.integral_theorem(0.01 * spent)
    Q = sd.jumps.RateMatrix([[0.0, 1.0, 0.5], [0.3, 0.0, 0.7], [0.2, 0.4, 0.0]])
    assert float(ne.short_time_bound(Q)) <= float(Q.entropy_production())
    ne.entropy_from_counts(sd.jumps.JumpMeasure(Q.stationary(), Q).sample_record(50.0, 20, seeded()))
    law = sd.DiffusionMeasure(torch.zeros(2), sd.SDE(lambda t, x: -x, 1.0))
    law.backward(1.0, torch.zeros(2), parity=None)
    law.reverse(lambda t, x: -x, 1.0, parity=None)


def test_populations() -> None:
    starts = [torch.randn(20 + i, 2, generator=seeded(i)) for i in range(4)]
    targets = [start + i for i, start in enumerate(starts)]
    data = sd.interpolants.Populations(starts, targets, treatments=None)
    for coupling in ("paired", "independent", "ot"):
        objective = sd.interpolants.PopulationRegression(
            dim=2, encoder=sd.interpolants.SetEncoder(2), coupling=coupling
        )
        sd.fit(objective, data, steps=2, progress=False)
        gen = objective.generator()
        predicted = gen.sample(starts[0])
        assert predicted.shape == (20, 2)
        assert gen.velocity(0.3, starts[0], population=starts[0]).shape == (20, 2)
    sd.interpolants.compare_populations(predicted, targets[0])
