"""The fused tanh network is the layered one, in value and in every derivative."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import MLP, StateNetwork
from stochdyn.errors import InvalidInputError, ShapeError
from tests.core.laws import F64


def layered(network: MLP) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in network.layers:
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sizes", [(3, 2), (2, 20, 1), (5, 64, 64, 3), (40, 33, 17, 9, 2)])
@pytest.mark.parametrize("batch", [(), (7,), (3, 7)])
def test_equals_linear_layers_with_tanh_between(
    sizes: tuple[int, ...], batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    network = MLP(sizes).to(dtype)
    x = torch.randn(*batch, sizes[0], dtype=dtype, requires_grad=True)
    tolerance = {"rtol": 0.0, "atol": 1e-12 if dtype == F64 else 3e-6}
    values, gradients = [], []
    for f in (network, layered(network)):
        value = f(x)
        values.append(value)
        gradients.append(torch.autograd.grad((value**2).sum(), [x, *network.parameters()]))
    assert values[0].shape == (*batch, sizes[-1])
    torch.testing.assert_close(values[0], values[1], **tolerance)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=tolerance["atol"] * 10
        )
    with torch.no_grad():
        torch.testing.assert_close(network(x), values[0])


def test_first_and_second_derivatives() -> None:
    network = MLP((2, 5, 4, 1)).double()
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    inputs = (x, *network.parameters())
    assert torch.autograd.gradcheck(lambda x, *w: network(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *w: network(x), inputs)


def test_a_derivative_with_a_graph_calls_autograd_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nested call would visit everything before the points, so that a loop over time took a time of its square."""
    net = MLP((2, 16, 16, 1)).to(F64)
    x = torch.zeros(5, 2, dtype=F64, requires_grad=True)
    calls, grad = [], torch.autograd.grad

    def counted(*args: object, **options: object) -> object:
        calls.append(args)
        return grad(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.autograd, "grad", counted)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    assert slope.requires_grad
    assert len(calls) == 1


def test_only_what_needs_a_gradient_gets_one() -> None:
    network = MLP((2, 5, 1)).double()
    for parameter in network.layers[0].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(3, 2, dtype=F64)
    network(x).sum().backward()
    assert [p.grad is not None for p in network.parameters()] == [False, False, True, True]
    frozen = copy.deepcopy(network).requires_grad_(False)
    assert not frozen(x).requires_grad
    slope = torch.autograd.grad(frozen(x.requires_grad_()).sum(), x, create_graph=True)[0]
    assert slope.requires_grad


def test_transforms_of_functions() -> None:
    network = MLP((2, 5, 3)).double()
    plain = layered(network)
    x, v = torch.randn(4, 2, dtype=F64), torch.randn(4, 2, dtype=F64)
    for transform in (
        lambda f: torch.func.vmap(torch.func.jacrev(f))(x),
        lambda f: torch.func.jvp(f, (x,), (v,))[1],
        lambda f: torch.func.vmap(torch.func.hessian(lambda y: f(y).sum()))(x),
    ):
        torch.testing.assert_close(transform(network), transform(plain))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(network(dual)).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(plain, (x,), (v,))[1])


def test_checkpointing_and_saving() -> None:
    network = MLP((2, 5, 1))
    x = torch.randn(4, 2, requires_grad=True)
    plain = torch.autograd.grad(network(x).sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], plain)
    other = MLP((2, 5, 1))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_a_last_layer_of_zeros_starts_as_the_zero_function() -> None:
    network = MLP((2, 5, 3), zero_last=True)
    x = torch.randn(4, 2)
    assert not network(x).any()
    network(x).sum().backward()
    last: Tensor | None = network.layers[-1].weight.grad  # type: ignore[assignment]
    assert last is not None
    assert last.any()


@pytest.mark.parametrize("sizes", [(3,), (), (3, 0), (3, 2.0)])
def test_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="sizes"):
        MLP(sizes)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "softplus", "elu", torch.sin, nn.SiLU()])
def test_other_activations_stand_between_the_layers(activation: object) -> None:
    network = MLP((2, 5, 4, 1), activation=activation).double()  # type: ignore[arg-type]
    f = getattr(nn.functional, activation) if isinstance(activation, str) else activation
    x = torch.randn(3, 2, dtype=F64)
    first, second, last = network.layers
    torch.testing.assert_close(network(x), last(f(second(f(first(x))))))  # type: ignore[operator]
    with pytest.raises(InvalidInputError, match="activation is unknown"):
        MLP((2, 3, 1), activation="tahn")


@pytest.mark.parametrize("lead", [(), (6,)])
def test_a_state_network_takes_time_of_no_axes_or_leading_and_a_context(lead: tuple[int, ...]) -> None:
    net = StateNetwork(2, 3, (8,), context=4, time=lambda t: torch.cat([t.sin(), t.cos()], -1)).double()
    x, context = torch.randn(*lead, 5, 2, dtype=F64), torch.randn(5, 4, dtype=F64)
    t = torch.linspace(0, 1, 6, dtype=F64).reshape(6, 1, 1) if lead else torch.tensor(0.3, dtype=F64)
    value = net(t, x, context)
    assert value.shape == (*lead, 5, 3)
    value = value.detach()
    one = net(float(t.flatten()[0]), x[0] if lead else x, context)
    torch.testing.assert_close(value[0] if lead else value, one.detach())
    for wrong in (None, context[:, :2]):
        with pytest.raises(ShapeError, match="context"):
            net(t, x, wrong)
    assert not StateNetwork(2, zero_last=True)(0.0, torch.randn(4, 2)).any()
