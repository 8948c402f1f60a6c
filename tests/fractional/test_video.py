"""The latent video model: its bound, its encoder, its predictions, its bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import stochdyn as sd
from stochdyn.core import Brownian
from stochdyn.datasets import moving_digits
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError
from stochdyn.fractional import FractionalNoise, VideoModel, VideoNetworks
from stochdyn.fractional.latent import StateDiffusion
from stochdyn.fractional.video import JointControl

SMALL: dict[str, Any] = {
    "num_frames": 5,
    "size": 16,
    "noise": FractionalNoise(num_states=5),
    "networks": VideoNetworks(latents=2, content=8, features=8, widths=(4, 8), hidden=(16,)),
}


def videos(count: int = 4, frames: int = 5) -> Tensor:
    return moving_digits(count, frames, 16, generator=torch.Generator().manual_seed(0))


def stirred(**changes: Any) -> VideoModel:
    """Return a model whose control and state-dependent diffusion are far from where they start."""
    model = VideoModel(**(SMALL | changes))
    with torch.no_grad():
        for p in [*model.control.parameters(), *model.equation.parameters()]:
            p.add_(0.6 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("noise", ["fractional", "brownian"])
def test_the_bound_is_the_expected_log_weight(noise: str) -> None:
    model = stirred(noise=noise, num_particles=2000)
    frames = videos(2) / 255
    with torch.no_grad():
        value = model(frames)
        encoded = model.encode(frames)
        law = model.posterior(encoded)
        path = law.sample(model.grid(5), (2000,))
        decoded = model.decode(path.x[..., ::3, :], encoded.content)
        fit = Normal(decoded, model.obs_scale).log_prob(frames).sum((-4, -3, -2, -1))
        # The true log density of the paths, with its martingale part, not the rate that training uses.
        weight = (fit - law.log_rn(path, model.prior(frames), "density")).mean(-1)
        divergence = law.log_rn(path, model.prior(frames), "density").mean(-1)
    for term, draws in (("elbo", weight), ("kl", divergence)):
        stderr = float(draws.std() / math.sqrt(2000))
        assert abs(float(value.terms[term] - draws.mean())) < 5 * math.sqrt(2) * stderr
    # The divergence is far from zero: a wrong sign or a lost term would show.
    assert float(value.terms["kl"]) > 20 * stderr


def test_the_loss_is_the_bound_and_reaches_every_parameter() -> None:
    model = stirred(noise=FractionalNoise(0.6, num_states=5))
    value = model(videos())
    assert value.bound == "evidence_lower"
    assert float(value.loss.detach()) == pytest.approx(-float(value.terms["elbo"]))
    value.loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert dead == []
    assert model.hurst is not None
    assert float(value.terms["hurst"]) == float(model.hurst.detach())


def test_brownian_noise_has_no_hurst_index() -> None:
    for noise in ("brownian", Brownian()):
        model = stirred(noise=noise)
        assert model.hurst is None
        assert "hurst" not in model(videos()).terms


def test_content_does_not_depend_on_the_order_of_frames() -> None:
    model = VideoModel(**SMALL)
    frames = videos() / 255
    forwards, backwards = model.encode(frames), model.encode(frames.flip(1))
    torch.testing.assert_close(forwards.content, backwards.content)
    assert not torch.allclose(forwards.start.mean, backwards.start.mean)


def test_contexts_are_interpolated_in_time() -> None:
    control = JointControl(3, 2, 5, (8,), dt=0.1)
    torch.nn.init.normal_(control.network.layers[-1].weight)
    contexts, z = torch.randn(4, 6, 5), torch.randn(6, 3)

    def at(t: float) -> Tensor:
        return control(torch.tensor(t), z, contexts)[0]

    def given(context: Tensor) -> Tensor:
        return control.network(torch.cat([z, context], -1))[..., :2]

    torch.testing.assert_close(at(0.2), given(contexts[2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at(0.3), given(contexts[3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at(0.9), given(contexts[3]), rtol=1e-4, atol=1e-5)  # held after the last frame
    torch.testing.assert_close(
        at(0.125), given(0.75 * contexts[1] + 0.25 * contexts[2]), rtol=1e-4, atol=1e-5
    )
    # With time leading all times are evaluated at once.
    times = torch.tensor([0.0, 0.125, 0.3])
    together = control(times.reshape(3, 1, 1, 1), z.expand(3, 7, 6, 3), contexts)
    for i, t in enumerate(times):
        for part, alone in zip(together, control(t, z.expand(7, 6, 3), contexts), strict=True):
            torch.testing.assert_close(part[i], alone)


def test_components_of_the_diffusion_depend_on_their_own_state_alone() -> None:
    diffusion = StateDiffusion(3, width=4)
    torch.nn.init.normal_(diffusion.out)
    jacobian = torch.func.jacrev(lambda x: diffusion(torch.tensor(0.0), x).apply(torch.ones(3)))(
        torch.randn(3)
    ).detach()
    off = jacobian - torch.diag(jacobian.diagonal())
    assert float(off.abs().max()) == 0
    assert float(jacobian.diagonal().abs().min()) > 0


def test_predictions_follow_the_prior_after_the_last_frame_given() -> None:
    model = stirred(num_steps=2)
    frames = videos(3)[:, :3]
    encoded = model.encode(frames / 255)
    law = model.posterior(encoded, until=0.2 - 1e-7)
    z = torch.randn(3, 2 + 2 * 5)
    control = law.sde.control
    assert control is not None
    for t, watched in ((0.15, True), (0.2, False), (0.35, False)):
        drift, precision = control.at(torch.tensor(t), z)
        assert bool((drift.abs() + precision.abs()).sum() > 0) is watched  # type: ignore[union-attr]
    ahead = model.predict(frames, 5, 7, torch.Generator().manual_seed(0))
    assert ahead.shape == (7, 3, 5, 1, 16, 16)
    assert float(ahead[:, :, 3:].std(0).min()) > 0
    torch.testing.assert_close(ahead, model.predict(frames, 5, 7, torch.Generator().manual_seed(0)))


def test_training_lowers_the_loss_and_resumes_to_the_same_bits(tmp_path: Any) -> None:
    data = videos(24)

    def run(steps: int, folder: Any) -> VideoModel:
        torch.manual_seed(0)
        model = VideoModel(**SMALL)
        sd.fit(model, data, steps, 3e-3, 8, progress=False, checkpoint=folder, resume=folder is not None)
        return model

    torch.manual_seed(0)
    before = float(VideoModel(**SMALL)(data).loss.detach())
    whole = run(20, None)
    assert float(whole(data).loss.detach()) < before - 50
    run(9, tmp_path)
    for a, b in zip(whole.parameters(), run(20, tmp_path).parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_published_size() -> None:
    model = VideoModel.paper("brownian")
    assert model.grid(25).shape == (73,)
    assert model.grid(25)[-1].item() == pytest.approx(2.4)
    assert model(moving_digits(1, 25, 64)).terms["elbo"].isfinite()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 24},
        {"networks": VideoNetworks(widths=(4, 8, 16))},
        {"networks": (4, 8, 16)},
        {"channels": 0},
        {"num_frames": 2},
        {"noise": "white"},
        {"num_steps": 0},
        {"obs_scale": 0.0},
        {"dt": -0.1},
        {"noise": FractionalNoise(torch.tensor([0.3, 0.7]))},
    ],
)
def test_models_that_make_no_sense_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        VideoModel(**(SMALL | change))


def test_videos_that_do_not_fit_are_refused() -> None:
    model = VideoModel(**SMALL)
    with pytest.raises(ShapeError, match="don't fit"):
        model(moving_digits(1, 5, 32))
    with pytest.raises(ShapeError, match="don't fit"):
        model(videos(2)[:, :2])
    with pytest.raises(ShapeError, match="frames"):
        model(videos(1)[0])
    with pytest.raises(InvalidInputError, match="longer than the horizon"):
        model(videos(1, 6))
    with pytest.raises(InvalidInputError, match="predict"):
        model.predict(videos(1), 5)
    with pytest.raises(InvalidInputError, match="predict"):
        model.predict(videos(1)[:, :3], 6)
    with pytest.raises(NonFiniteError):
        model(torch.full((1, 5, 1, 16, 16), math.nan))
    with pytest.raises(InvalidInputError, match="batch"):
        model(None)


@pytest.mark.parametrize("frames", [videos().float(), videos().to(torch.int64), -videos().float() / 255])
def test_pixels_of_another_range_are_refused(frames: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"uint8, or floats in \[0, 1\]"):
        VideoModel(**SMALL)(frames)


@pytest.mark.parametrize(
    "sizes", [{"latents": 0}, {"widths": 8}, {"hidden": (0,)}, {"diffusion_width": -1}, {"content": 1.5}]
)
def test_networks_that_make_no_sense_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(sizes))):
        VideoNetworks(**sizes)
