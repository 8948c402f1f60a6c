"""Fields learnt as corrections of a Gaussian's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn import errors
from stochdyn.interpolants import (
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantRegression,
    WhitenedField,
)
from tests.interpolants.truths import ALL_PATHS, F64, fields_of

TIMES = torch.tensor([0.0, 1e-3, 0.15, 0.4, 0.85, 0.999, 1.0], dtype=F64)
INSIDE = TIMES[1:-1]
ONE = torch.ones(1, dtype=F64)


def _gaussians(path: str) -> tuple[GaussianMixtureInterpolant, list[Tensor]]:
    """The exact interpolant of two Gaussians with common axes, and their moments in these axes."""
    it = Interpolant(path)
    g = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=g))[0]
    mean0, mean1 = torch.randn(2, 3, dtype=F64, generator=g)
    v0, v1 = torch.tensor([[0.3, 1.0, 2.0], [0.1, 4.0, 0.7]], dtype=F64)
    if it.kind == "one-sided":
        mean0, v0 = torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)

    def law(mean: Tensor, v: Tensor) -> GaussianMixture:
        return GaussianMixture(ONE, mean[None], basis @ v.diag() @ basis.mT)

    first = None if it.kind in ("one-sided", "mirror") else law(mean0, v0)
    return GaussianMixtureInterpolant(it, first, law(mean1, v1)), [
        mean0 @ basis,
        v0,
        mean1 @ basis,
        v1,
        basis,
    ]


def _learnable(flow: GaussianMixtureInterpolant) -> list[str]:
    return [n for n in fields_of(flow) if n != "path_velocity" or flow.interpolant.kind != "mirror"]


@pytest.mark.parametrize("path", ALL_PATHS)
def test_an_untrained_field_is_that_of_the_gaussians(path: str) -> None:
    flow, moments = _gaussians(path)
    x = torch.randn(len(INSIDE), 6, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = INSIDE[:, None, None]
    for name in _learnable(flow):
        field = WhitenedField(flow.interpolant, name, *moments)
        exact = getattr(flow, name)(t, x)
        torch.testing.assert_close(field(t, x), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ["linear", "one-sided-linear", "vp", "mirror"])
def test_fields_are_finite_at_both_ends_whatever_the_network(path: str) -> None:
    flow, moments = _gaussians(path)
    for name in _learnable(flow):
        field = WhitenedField(flow.interpolant, name, *moments, frequencies=4)
        torch.nn.init.normal_(field.network.layers[-1].weight)
        values = field(TIMES[:, None], torch.randn(len(TIMES), 3, dtype=F64))
        assert bool(torch.isfinite(values).all()), name


def test_one_network_learns_both_parts_of_a_velocity() -> None:
    """A velocity is v plus gamma' times the noise_prediction: moving one output moves the field by its own gain."""
    flow, moments = _gaussians("linear")
    field = WhitenedField(flow.interpolant, "velocity", *moments)
    x, t = torch.randn(5, 3, dtype=F64), torch.full((5, 1), 0.3, dtype=F64)
    plain = field(t, x).detach()
    bias = field.network.layers[-1].bias
    _, v0, _, v1, basis = moments
    for part, gain in ((0, (v0 + v1).sqrt()), (1, flow.interpolant.gamma.derivative(t[0]).expand(3))):
        for i in range(3):
            with torch.no_grad():
                bias.zero_()
                bias[3 * part + i] = 1.0
            moved = field(t, x).detach() - plain
            torch.testing.assert_close(moved, (gain[i] * basis[:, i]).expand(5, 3), rtol=1e-9, atol=1e-9)


def test_fields_turn_and_shift_with_the_data() -> None:
    flow, (mean0, v0, mean1, v1, basis) = _gaussians("linear")
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=F64))[0]
    shift = torch.tensor([5.0, -1.0, 2.0], dtype=F64)
    it, t = flow.interpolant, torch.rand(4, 1, dtype=F64)
    x = torch.randn(4, 3, dtype=F64)
    torch.manual_seed(0)
    here = WhitenedField(it, "velocity", mean0, v0, mean1, v1, basis, frequencies=5)
    torch.nn.init.normal_(here.network.layers[-1].weight)
    moved = shift @ (turn @ basis)
    there = WhitenedField(it, "velocity", mean0 + moved, v0, mean1 + moved, v1, turn @ basis, frequencies=5)
    there.network.load_state_dict(here.network.state_dict())
    assert there.waves is not None
    assert here.waves is not None
    there.waves.copy_(here.waves)
    torch.testing.assert_close(there(t, x @ turn.mT + shift), here(t, x) @ turn.mT, rtol=1e-9, atol=1e-9)


def test_what_the_path_learns_is_not_the_field_s_to_train() -> None:
    class Bend(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = torch.nn.Parameter(torch.ones(()))

        def forward(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
            return self.size * (x1 - x0)

    it = Interpolant(correction=Bend())
    assert len(list(it.parameters())) == 1
    field = WhitenedField.from_data(it, "velocity", torch.randn(50, 2))
    assert not {id(p) for p in it.parameters()} & {id(p) for p in field.parameters()}


def test_moments_come_from_the_data() -> None:
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(400, 2, generator=g), torch.randn(400, 2, generator=g) * torch.tensor([3.0, 0.1]) + 7
    field = WhitenedField.from_data(Interpolant(), "velocity", x1, x0)
    assert field.basis is not None
    torch.testing.assert_close(field.mean1, (x1 @ field.basis).mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(field.variance1, (x1 @ field.basis).var(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(field.variance0, (x0 @ field.basis).var(0), rtol=1e-3, atol=1e-4)
    plain = WhitenedField.from_data(Interpolant("one-sided-linear"), "data_prediction", x1, rotate=False)
    assert plain.basis is None
    torch.testing.assert_close(plain.mean0, torch.zeros(2))
    torch.testing.assert_close(plain.variance0, torch.ones(2))
    assert (
        WhitenedField.from_data(Interpolant(), "path_velocity", x1.double(), x0.double())
        .network.layers[0]
        .weight.dtype
        == F64
    )


def test_it_learns_and_is_conditioned() -> None:
    """The loss of two labelled clusters falls below that of the best Gaussian, which is where it starts."""
    torch.manual_seed(0)
    label = torch.randint(2, (512,))
    x1 = 4.0 * label[:, None] - 2 + 0.3 * torch.randn(512, 2)
    it = Interpolant("linear", "zero")
    net = WhitenedField.from_data(it, "velocity", x1, width=32, depth=2, num_classes=2, frequencies=3)
    objective = InterpolantRegression(it, velocity=net, base=None)
    batch = (torch.randn(512, 2), x1, label)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # given the label, what is left is the noise of the start and of the cluster: at most half of 2 (1 + 0.09)
    assert sum(losses[-20:]) / 20 < 1.2 < losses[0]
    with torch.no_grad():
        apart = net(torch.full((1, 1), 0.1), torch.zeros(1, 2), torch.ones(1, dtype=torch.long))
        assert float(apart.min()) > 1.0


def test_bad_input_is_refused() -> None:
    it, x = Interpolant(), torch.randn(10, 2)
    with pytest.raises(errors.InvalidInputError, match="name"):
        WhitenedField.from_data(it, "speed", x)
    with pytest.raises(errors.InvalidInputError, match="no noise_prediction"):
        WhitenedField.from_data(Interpolant("linear", "zero"), "noise_prediction", x)
    with pytest.raises(errors.ShapeError):
        WhitenedField.from_data(it, "velocity", x, torch.randn(10, 3))
    with pytest.raises(errors.ShapeError):
        WhitenedField.from_data(it, "velocity", torch.randn(10))
    with pytest.raises(errors.TooFewDrawsError):
        WhitenedField.from_data(it, "velocity", x[:1])
    with pytest.raises(errors.NonFiniteError):
        WhitenedField.from_data(it, "velocity", x * torch.nan)
    with pytest.raises(errors.DtypeMismatchError):
        WhitenedField.from_data(it, "velocity", x, x.double())
    with pytest.raises(errors.InvalidInputError, match="clip"):
        WhitenedField.from_data(it, "velocity", x, clip=0.7)
    with pytest.raises(errors.InvalidInputError, match="finest"):
        WhitenedField.from_data(it, "velocity", x, frequencies=3, finest=0.5)
    with pytest.raises(errors.ShapeError):
        WhitenedField.from_data(it, "velocity", x)(torch.rand(3, 1), torch.zeros(3, 4))
