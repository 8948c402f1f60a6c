"""The time loop: every fast path equals the plain recursion; gradients, checkpointing, precisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochdyn as sd
from stochdyn.core import Control, Euler, draw_increments, integrate, step_everywhere
from stochdyn.core.sde import Problem
from stochdyn.core.sde.solvers import full_state, remember
from stochdyn.errors import InvalidInputError
from tests.core.laws import F64, EulerMemory, ExactMemory

TS = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.6, 1.0], dtype=F64)

DIFFUSIONS: dict[str, Any] = {
    "number": 0.7,
    "scalar per path": sd.Scalar(torch.linspace(0.5, 1.5, 4, dtype=F64)),
    "diagonal": torch.tensor([0.5, 1.5], dtype=F64),
    "diagonal per path": sd.Diagonal(torch.linspace(0.5, 1.5, 8, dtype=F64).reshape(4, 2)),
    "matrix": torch.tensor([[0.5, 0.1, 0.2], [0.0, -1.0, 0.4]], dtype=F64),
    "one channel": torch.tensor([[0.5], [0.1]], dtype=F64),
    "matrix per path": sd.Matrix(torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 2, 2)),
    "of the state": lambda t, x: 1 + 0.5 * torch.sin(x + t),
}
NOISES: dict[str, Callable[[], Any]] = {
    "Brownian": lambda: None,
    "exact memory": lambda: ExactMemory([0.3, 2.0], [0.5, -0.7]),
    "Euler memory": lambda: EulerMemory(torch.tensor([0.3, 2.0]), torch.tensor([0.5, -0.7])),
}
CONTROLS = ("none", "drift", "precision", "both")


def drift(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(x).flip(-1) - t


def _equation(diffusion: str, noise: str, control: str) -> sd.SDE:
    sde = sd.SDE(drift, DIFFUSIONS[diffusion], NOISES[noise]())
    channels = sde.noise_dim(TS[0], torch.zeros(4, 2, dtype=F64))

    def u(t: Tensor, z: Tensor) -> Tensor:
        return torch.cos(z.sum(-1, keepdim=True) + t) * torch.arange(1, channels + 1, dtype=z.dtype)

    def precision(t: Tensor, z: Tensor) -> Tensor:
        return (z**2).sum(-1, keepdim=True) * torch.ones(channels, dtype=z.dtype)

    if control == "none":
        return sde
    return sde.controlled(u if control != "precision" else None, precision if control != "drift" else None)


def _by_hand(sde: sd.SDE, x: Tensor, dw: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the states by the plain Euler recursion."""
    channels = sde.noise_dim(TS[0], x)
    steps = sde.noise.steps(TS, dtype=F64)
    memory = x.new_zeros(*x.shape[:-1], channels, sde.noise.num_states) if sde.noise.num_states else None
    states, memories = [x], [memory]
    for n, (t, dt) in enumerate(zip(TS[:-1], TS[1:] - TS[:-1], strict=True)):
        e = dw[n].clone()
        if sde.control is not None:
            u, precision = sde.control.at(t, full_state(x, memory))
            if precision is not None:
                e[..., :channels] /= (1 + precision * dt) ** 0.5
            if u is not None:
                e[..., :channels] += u * dt
        dz = e
        if memory is not None:
            dz, memory = remember(steps, n, memory, e, channels)
        g = sde.diffusion(t, x).matrix(2)
        x = x + sde.drift(t, x) * dt + (g @ dz.unsqueeze(-1)).squeeze(-1)
        states.append(x)
        memories.append(memory)
    return torch.stack(states), None if memory is None else torch.stack(memories)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("diffusion", "noise", "control"), [*itertools.product(DIFFUSIONS, NOISES, CONTROLS)]
)
def test_euler_is_the_plain_recursion(diffusion: str, noise: str, control: str) -> None:
    sde = _equation(diffusion, noise, control)
    x0 = torch.randn(4, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    run = integrate(sde, x0, TS, dw)
    x, memory = _by_hand(sde, x0, dw)
    torch.testing.assert_close(run.x, x, rtol=1e-12, atol=1e-12)
    if memory is not None:
        torch.testing.assert_close(run.memory, memory, rtol=1e-12, atol=1e-12)
    if control != "none":
        z = full_state(run.x, run.memory)[:-1]
        u, precision = sde.control.at(TS[:-1, None, None], z)  # type: ignore[union-attr]
        for noted, value in ((run.control, u), (run.precision, precision)):
            assert (noted is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(noted, value)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_batch_shape(noise: str, batch: tuple[int, ...]) -> None:
    sde = _equation("matrix", noise, "both")
    x0 = torch.randn(*batch, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    run = integrate(sde, x0, TS, dw)
    flat = integrate(sde, x0.reshape(-1, 2), TS, dw.reshape(5, -1, dw.shape[-1]))
    assert run.x.shape == (6, *batch, 2)
    torch.testing.assert_close(run.x.reshape(6, -1, 2), flat.x)


@pytest.mark.parametrize("noise", NOISES)
def test_increments_may_carry_more_axes_than_the_start(noise: str) -> None:
    sde = _equation("diagonal", noise, "drift")
    x0 = torch.randn(3, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0.expand(5, 3, 2), TS)
    run = integrate(sde, x0, TS, dw)
    torch.testing.assert_close(run.x[:, 1], integrate(sde, x0, TS, dw[:, 1]).x)


def test_many_memory_states_take_another_route_to_the_same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    sde = _equation("diagonal", "exact memory", "both")
    x0 = torch.randn(3, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    dense = integrate(sde, x0, TS, dw)
    monkeypatch.setattr("stochdyn.core.sde._steps._DENSE", 0)
    assert Problem(sde, x0, TS, [], dw, "euler").step().__name__ == "_general"
    other = integrate(sde, x0, TS, dw)
    torch.testing.assert_close(dense.x, other.x)
    torch.testing.assert_close(dense.memory, other.memory)


@pytest.mark.parametrize("noise", NOISES)
def test_initial_memory_is_where_the_states_start(noise: str) -> None:
    if noise == "Brownian":
        pytest.skip("Brownian motion has no memory")
    sde = _equation("number", noise, "none")
    x0, memory0 = torch.zeros(4, 2, dtype=F64), torch.randn(4, 2, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    run = integrate(sde, x0, TS, dw, memory0)
    assert run.memory is not None
    torch.testing.assert_close(run.memory[0], memory0)
    dz, after = remember(sde.noise.steps(TS, dtype=F64), 0, memory0, dw[0], 2)
    torch.testing.assert_close(run.memory[1], after)
    torch.testing.assert_close(run.x[1], 0.7 * dz)


@pytest.mark.parametrize("noise", NOISES)
def test_one_step_from_everywhere_retraces_the_path(noise: str) -> None:
    sde = _equation("of the state", noise, "none")
    x0 = torch.randn(4, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    run = integrate(sde, x0, TS, dw)
    z = full_state(run.x, run.memory)
    torch.testing.assert_close(step_everywhere(sde, TS, z[:-1], dw), z[1:])


@pytest.mark.parametrize("method", ["euler", "heun", "milstein"])
@pytest.mark.parametrize("noise", ["Brownian", "exact memory"])
def test_gradients_through_the_loop(method: str, noise: str) -> None:
    memory = NOISES[noise]()
    strength = torch.tensor([0.5, 0.8], dtype=F64, requires_grad=True)
    rate = torch.tensor(0.3, dtype=F64, requires_grad=True)
    gain = torch.tensor(0.7, dtype=F64, requires_grad=True)
    ts, x0 = TS[:4], torch.tensor([[0.5, 1.0]], dtype=F64, requires_grad=True)
    width = 2 * (1 if memory is None else memory.num_innovations(ts))
    dw = (0.3 * torch.randn(3, 1, width, dtype=F64)).requires_grad_()

    def run(x0: Tensor, dw: Tensor, strength: Tensor, rate: Tensor, gain: Tensor) -> Tensor:
        sde = sd.SDE(lambda t, x: -rate * x**2, lambda t, x: strength * (2 + torch.sin(x)), memory)
        controlled = sde.controlled(lambda t, z: gain * z[..., :2], lambda t, z: (gain * z[..., -2:]) ** 2)
        out = integrate(controlled, x0, ts, dw, method=method)
        return torch.cat([out.x.flatten(), out.control.flatten()])  # type: ignore[union-attr]

    assert torch.autograd.gradcheck(run, (x0, dw, strength, rate, gain))


class Network(nn.Module):
    """A small control network of time and state."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size + 1, 16), nn.Tanh(), nn.Linear(16, out))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layers(torch.cat([t.expand(*z.shape[:-1], 1), z], -1))


def _saved_bytes(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Return the bytes that the forward pass keeps for back-propagation, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = run()
    return sum(storages.values()), value


@pytest.mark.parametrize("noise", ["Brownian", "exact memory"])
@pytest.mark.parametrize("checkpoint", [True, 7])
def test_checkpointing_gives_the_same_bits_for_less_memory(noise: str, checkpoint: bool | int) -> None:
    memory = NOISES[noise]()
    net = Network(2 if memory is None else 6, 2).double()
    sde = sd.SDE(drift, 0.7, memory).controlled(net)
    ts, x0 = torch.linspace(0, 1, 101, dtype=F64), torch.randn(8, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, ts)
    results = []
    for setting in (False, checkpoint):

        def run(setting: bool | int = setting) -> Tensor:
            out = integrate(sde, x0, ts, dw, checkpoint=setting)
            return (out.x[-1] ** 2).sum() + (out.control**2).sum()  # type: ignore[operator]

        size, value = _saved_bytes(run)
        gradients = torch.autograd.grad(value, list(net.parameters()))
        results.append((size, value, gradients))
    (plain, value, gradients), (fewer, other_value, other_gradients) = results
    assert torch.equal(value, other_value)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    assert fewer < 0.4 * plain


def test_cuda_graph_is_ignored_off_cuda() -> None:
    sde = _equation("diagonal", "Brownian", "drift")
    x0 = torch.randn(4, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    assert torch.equal(
        integrate(sde, x0, TS, dw, method=Euler(cuda_graph=True)).x, integrate(sde, x0, TS, dw).x
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_replays_the_loop_and_its_gradient() -> None:
    net = Network(2, 2).cuda()
    sde = sd.SDE(lambda t, x: -x, 0.7).controlled(net)
    ts, x0 = torch.linspace(0, 1, 51, device="cuda"), torch.randn(64, 2, device="cuda")
    for _ in range(3):
        dw, _ = draw_increments(sde, x0, ts)
        results = []
        for graphed in (True, False):
            x = integrate(sde, x0, ts, dw, method=Euler(cuda_graph=graphed)).x
            results.append(
                (x.detach().clone(), torch.autograd.grad(x[-1].square().sum(), list(net.parameters())))
            )
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["euler", "heun", "milstein"])
def test_precision_follows_the_state_and_steps_the_grid(method: str) -> None:
    sde = sd.SDE(lambda t, x: -x, lambda t, x: 0.2 + 0.1 * x)
    # In float32 these times have no distinct neighbours; their differences are taken before rounding.
    ts = 1e5 + torch.linspace(0, 1, 301, dtype=F64)
    x0 = torch.ones(3, 1)
    dw, _ = draw_increments(sde, x0, ts)
    single = integrate(sde, x0, ts, dw, method=method).x
    double = integrate(sde, x0.double(), ts, dw.double(), method=method).x
    assert single.dtype == torch.float32
    assert double.dtype == F64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-5)


class _CountReads(TorchDispatchMode):
    """Counts operations that read a value back to the host, as a wait for the device would."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["euler", "heun", "milstein"])
@pytest.mark.parametrize("diffusion", ["diagonal", "of the state"])
def test_the_loop_never_waits_for_the_device(method: str, diffusion: str) -> None:
    # Diagonal noise whose component i depends on x_i alone, or none at all, commutes.
    sde = sd.SDE(lambda t, x: -x, DIFFUSIONS[diffusion]).controlled(lambda t, z: z)
    reads = []
    for n in (5, 25):
        ts, x0 = torch.linspace(0, 1, n + 1, dtype=F64), torch.randn(4, 2, dtype=F64)
        dw, _ = draw_increments(sde, x0, ts)
        with _CountReads() as count:
            integrate(sde, x0, ts, dw, method=method)
        reads.append(count.reads)
    assert reads[0] == reads[1]


ROTATION = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
NOT_COMMUTING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "shear and rotation": lambda t, x: torch.stack(
        [x @ ROTATION.T, x * torch.tensor([1.0, 2.0], dtype=F64)], -1
    ),
    "one strength of all components": lambda t, x: sd.Scalar(1 + (x**2).sum(-1)),
    "diagonal that depends on another component": lambda t, x: 2 + torch.sin(x).flip(-1),
}


@pytest.mark.parametrize("method", ["milstein", "heun"])
@pytest.mark.parametrize("case", NOT_COMMUTING)
def test_noise_that_does_not_commute_is_refused(method: str, case: str) -> None:
    sde = sd.SDE(lambda t, x: -x, NOT_COMMUTING[case])
    x0 = torch.ones(3, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    with pytest.raises(InvalidInputError, match=r"commutative noise.*Use method='euler'"):
        integrate(sde, x0, TS, dw, method=method)
    assert torch.isfinite(integrate(sde, x0, TS, dw).x).all()


def test_unknown_methods_are_named() -> None:
    sde = sd.SDE(lambda t, x: -x, 1.0)
    with pytest.raises(InvalidInputError, match=r"method is unknown.*'euler' | 'heun' | 'milstein'"):
        integrate(sde, torch.zeros(1), TS, torch.zeros(5, 1), method="rk4")


class _Doubling(Control):
    def shape_increment(self, n: int, t: Tensor, dt: float, z: Tensor, e: Tensor, channels: int) -> Tensor:
        return 2 * e + n


@pytest.mark.parametrize("noise", NOISES)
def test_a_control_may_shape_all_increments_its_own_way(noise: str) -> None:
    sde = sd.SDE(drift, 0.7, NOISES[noise]())
    x0 = torch.randn(4, 2, dtype=F64)
    dw, _ = draw_increments(sde, x0, TS)
    shaped = 2 * dw + torch.arange(5, dtype=F64)[:, None, None]
    run = integrate(sde.with_control(_Doubling()), x0, TS, dw)
    torch.testing.assert_close(run.x, integrate(sde, x0, TS, shaped).x)
    assert run.control is None


@pytest.mark.parametrize("diffusion", [0.7, torch.tensor([0.5, 2.0]), torch.tensor([[1.0], [0.5]])])
def test_without_gradients_the_path_is_the_same(diffusion: float | torch.Tensor) -> None:
    law = sd.DiffusionMeasure(torch.ones(3, 2), sd.SDE(lambda t, x: torch.sin(x) - t, diffusion))
    ts = torch.linspace(0, 1, 9)
    with torch.enable_grad():
        recorded = law.sample(ts, (5,), torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = law.sample(ts, (5,), torch.Generator().manual_seed(1))
    assert torch.equal(plain.dw, recorded.dw)
    torch.testing.assert_close(plain.x, recorded.x, rtol=1e-6, atol=1e-6)
