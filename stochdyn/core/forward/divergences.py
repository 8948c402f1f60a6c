"""Divergences of vector fields and Laplacians of log densities: exact, forward-mode, or by random probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_callable,
    check_choice,
    check_ndim,
    check_nonempty,
    check_points,
    check_positive_int,
    check_type,
)
from stochdyn._transforms import as_leaf, recording
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = [
    "Hutchinson",
    "TraceMethod",
    "divergence",
    "divergence_probes",
    "gradient",
    "jacobian_contraction",
    "laplacian",
    "sample_probes",
    "unbiased_square",
    "value_and_divergence",
]

Distribution = Literal["rademacher", "gaussian"]
VectorField = Callable[[Tensor], Tensor]
ScalarField = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Hutchinson:
    r"""Hutchinson's estimator of a trace: random vectors of unit covariance in place of a basis.

    .. math:: \operatorname{tr}A=E\,\epsilon^\top A\epsilon,\qquad E\,\epsilon\epsilon^\top=I

    Use it where the dimension is so large that a derivative per component costs too much: a probe costs one reverse pass.

    Args:
        num_probes: The number of independent probes per point. A square without bias needs at least two.
        distribution: The distribution of a probe: ``"rademacher"`` (random signs, which have the least variance) or
            ``"gaussian"``.

    Example:
        >>> divergence(lambda x: 2 * x, torch.zeros(3), Hutchinson(num_probes=1))
        tensor(6.)

    Reference:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """

    num_probes: int = 2
    distribution: Distribution = "rademacher"

    def __post_init__(self) -> None:
        check_positive_int(self.num_probes, "num_probes")
        check_choice(self.distribution, ("rademacher", "gaussian"), "distribution")

    def sample(self, x: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw probes ``(num_probes, *x.shape)`` by :func:`sample_probes`."""
        return sample_probes(x, self.num_probes, self.distribution, generator)


TraceMethod = Literal["exact", "forward", "hutchinson"] | Hutchinson


def as_trace_method(
    method: object, choices: tuple[str, ...] = ("exact", "forward", "hutchinson")
) -> str | Hutchinson:
    """Return a method of computing traces: the object with its options, or the name of one that has none."""
    if isinstance(method, Hutchinson):
        return method
    check_choice(method, choices, "method")
    return Hutchinson() if method == "hutchinson" else str(method)


def attach(x: Tensor) -> Tensor:
    """Return ``x`` as a tensor to differentiate with respect to, still connected to the graph of ``x``."""
    check_points(x)
    if not x.is_floating_point():
        raise InvalidInputError("x must be floating to be differentiated", got=x.dtype, hint="use x.float()")
    return x.view_as(x) if x.requires_grad else as_leaf(x)


def check_computed(values: Tensor, x: Tensor, name: str) -> None:
    """Raise unless ``values`` and ``x`` are tensors, with derivatives of the one in the other."""
    check_type(values, Tensor, name)
    check_type(x, Tensor, "x")
    if not x.requires_grad:
        raise InvalidInputError(
            f"x must be the tensor that {name} was computed from, with requires_grad",
            got=f"shape {tuple(x.shape)}",
        )


def pull_back(out: Tensor, x: Tensor, weights: Tensor | None = None, create_graph: bool = True) -> Tensor:
    """Return the gradient of ``sum(weights * out)`` in ``x``, zero where ``out`` doesn't depend on it."""
    if not out.requires_grad:
        return torch.zeros_like(x)
    if weights is not None and (weights.shape != out.shape or weights.dtype != out.dtype):
        raise ShapeError(
            "directions must be like what is differentiated",
            got=f"{weights.dtype} {tuple(weights.shape)}",
            expected=f"{out.dtype} {tuple(out.shape)}",
        )
    return torch.autograd.grad(
        out, x, torch.ones_like(out) if weights is None else weights,
        retain_graph=True, create_graph=create_graph, materialize_grads=True,
    )[0]  # fmt: skip


def release(result: Tensor, keep: bool, *inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Cut ``result`` off from the graph if nothing but our own leaves could be differentiated through it.

    Without this every derivative would come with a graph, and a loop that feeds on derivatives would hold all
    of its steps in memory, though nothing in it is trained.

    Args:
        result: A derivative that was computed with a graph.
        keep: Whether gradients were on outside; if not, the result is detached.
        inputs: Pairs of what the caller gave and what :func:`attach` made of it.
    """
    if not keep:
        return result.detach()
    if any(given.requires_grad for given, _ in inputs):
        return result
    own = {id(leaf) for _, leaf in inputs}
    stack, seen = [result.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return result
        stack.extend(parent for parent, _ in node.next_functions)
    return result.detach()


def gradient(function: ScalarField, x: Tensor) -> Tensor:
    r"""Gradient of a scalar field at every point.

    .. math:: g(x) = \nabla f(x)

    Args:
        function: A function that maps ``(..., d)`` to ``(...)``, every point by itself.
        x: The points ``(..., d)``.

    Returns:
        ``(..., d)``; differentiable in ``x`` and in the parameters of ``function`` that require gradients.

    Example:
        >>> gradient(lambda x: 0.5 * x.square().sum(-1), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    check_callable(function, "function", "a function of points")
    create_graph = torch.is_grad_enabled()
    with recording():
        y = attach(x)
        result = pull_back(function(y), y, create_graph=create_graph)
    return release(result, create_graph, (x, y))


def sample_probes(
    x: Tensor,
    num_probes: int = 1,
    distribution: Distribution = "rademacher",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    """Draw independent probe vectors of zero mean and unit covariance, ``(num_probes, *x.shape)``.

    Args:
        x: The points whose shape, precision and device the probes take.
        num_probes: The number of probes.
        distribution: The distribution of a probe: ``"rademacher"`` (signs; the least variance) or ``"gaussian"``.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Example:
        >>> sample_probes(torch.zeros(5, 3), 2).shape
        torch.Size([2, 5, 3])
    """
    check_type(x, Tensor, "x")
    check_positive_int(num_probes, "num_probes")
    check_choice(distribution, ("rademacher", "gaussian"), "distribution")
    generator = as_generator(generator, x.device)
    shape = (num_probes, *x.shape)
    if distribution == "gaussian":
        return torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.randint(0, 2, shape, device=x.device, generator=generator).to(x.dtype).mul_(2).sub_(1)


def unbiased_square(estimates: Tensor) -> Tensor:
    r"""Square of a mean, unbiased, from independent unbiased estimates of that mean.

    The square of a noisy estimate is too large by its variance; the product of two independent ones isn't.
    All pairs are used:

    .. math:: \frac{1}{K(K-1)}\sum_{i\ne j} r_i r_j

    Args:
        estimates: The independent estimates ``(K, ...)``, ``K >= 2``.

    Returns:
        ``(...)``; single values may be negative.

    Raises:
        ShapeError: If there are fewer than two estimates.

    Example:
        >>> unbiased_square(torch.tensor([2.0, 3.0]))
        tensor(6.)
    """
    check_type(estimates, Tensor, "estimates")
    if estimates.ndim == 0 or estimates.shape[0] < 2:
        raise ShapeError(
            "an unbiased square needs at least two independent estimates",
            got=f"shape {tuple(estimates.shape)}",
            hint="raise num_probes to 2",
        )
    # sum_{i != j} r_i r_j = (sum r)^2 - sum r^2.
    k = estimates.shape[0]
    return (estimates.sum(0).square() - estimates.square().sum(0)) / (k * (k - 1))


def _forward_diagonal(field: VectorField, x: Tensor) -> tuple[Tensor, Tensor]:
    # One forward derivative per basis vector e_i, all at once: e_i . (dv/dx) e_i.
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    x = x.contiguous()  # forward mode refuses expanded tensors
    basis = eye.reshape(-1, *(1,) * (x.ndim - 1), x.shape[-1]).expand(-1, *x.shape)

    def spread(y: Tensor) -> Tensor:
        return field(y).expand_as(y)

    def along(direction: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.func.jvp(spread, (x,), (direction,))  # type: ignore[misc]
        return value, (slope * direction).sum(-1)

    value, diagonal = torch.func.vmap(along, out_dims=(None, 0))(basis)  # type: ignore[arg-type]
    return value, diagonal.sum(0)


def divergence_probes(field: Tensor, x: Tensor, probes: Tensor, create_graph: bool = True) -> Tensor:
    r"""Hutchinson estimates of a divergence, one per probe, of a field that is already evaluated.

    .. math:: \nabla\cdot v \approx \epsilon_k^\top\,(\partial v/\partial x)\,\epsilon_k

    Args:
        field: The values ``(..., d)`` of the field, computed from ``x``.
        x: The points ``(..., d)``, with ``requires_grad``.
        probes: The probes ``(K, ..., d)`` from :func:`sample_probes`.
        create_graph: Whether the result is to be differentiated.

    Returns:
        ``(K, ...)`` unbiased estimates, independent given the field.

    Example:
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> divergence_probes(2 * x, x, sample_probes(x, 2)).shape
        torch.Size([2, 4])

    Reference:
        Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """
    check_computed(field, x, "field")
    check_points(probes, "probes", "(K, ..., d)")
    check_ndim(probes, x.ndim + 1, "probes", "(K, ..., d)")
    check_nonempty(probes, "probes")
    return torch.stack([(pull_back(field, x, e, create_graph) * e).sum(-1) for e in probes])


def value_and_divergence(
    field: VectorField,
    x: Tensor,
    method: TraceMethod = "exact",
    *,
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the field ``(..., d)`` and its divergence ``(...)``; see :func:`divergence`."""
    chosen = as_trace_method(method)
    check_callable(field, "field", "a function of points")
    check_points(x)
    check_nonempty(x, "x")
    if chosen == "forward":
        try:
            return _forward_diagonal(field, x)
        except (NotImplementedError, RuntimeError) as error:
            # Not every operation has a forward derivative, and custom functions may lack one: reverse mode gives the same.
            if not any(word in str(error) for word in ("forward", "setup_context", "vmap", "functorch")):
                raise
    create_graph = torch.is_grad_enabled()
    with recording():
        y = attach(x)
        value = field(y).expand_as(y)
        if isinstance(chosen, Hutchinson):
            result = divergence_probes(value, y, chosen.sample(x, generator), create_graph).mean(0)
        else:
            result = exact_divergence(value, y, create_graph)
    return release(value, create_graph, (x, y)), release(result, create_graph, (x, y))


def exact_divergence(field: Tensor, x: Tensor, create_graph: bool = True) -> Tensor:
    """Return the divergence of an evaluated field by one reverse pass per component."""
    parts = [pull_back(field[..., i], x, create_graph=create_graph)[..., i] for i in range(x.shape[-1])]
    return torch.stack(parts).sum(0)


def divergence(
    field: VectorField,
    x: Tensor,
    method: TraceMethod = "exact",
    *,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Divergence of a vector field at every point.

    .. math:: \nabla\cdot v(x) = \sum_i \partial_i v_i(x)

    Args:
        field: A function that maps ``(..., d)`` to ``(..., d)``, every point by itself (so no batch normalisation).
        x: The points ``(..., d)``; any leading axes, time among them.
        method: The method: ``"exact"``: ``d`` reverse passes; works with every field and is the fastest on CPU.
            ``"forward"``: one batched forward-mode pass of ``torch.func``, few and large kernels; the field may not
            call ``torch.autograd.grad`` itself, and one without forward derivatives is taken in reverse mode.
            ``"hutchinson"``: one reverse pass per probe, unbiased; :class:`Hutchinson` has its options.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        ``(...)``; differentiable unless gradients are off.

    Raises:
        InvalidInputError: If ``method`` is unknown.

    Example:
        >>> divergence(lambda x: x.square(), torch.tensor([1.0, 2.0]))
        tensor(6.)
    """
    return value_and_divergence(field, x, method, generator=generator)[1]


def laplacian(
    function: ScalarField,
    x: Tensor,
    method: TraceMethod = "exact",
    *,
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Laplacian of a scalar field at every point, the divergence of its gradient.

    .. math:: \Delta f(x) = \sum_i \partial_i^2 f(x)

    Args:
        function: A function that maps ``(..., d)`` to ``(...)``, every point by itself.
        x: The points ``(..., d)``.
        method: The method: ``"exact"``, ``"forward"`` (forward over reverse) or ``"hutchinson"``, see
            :func:`divergence`.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        ``(...)``; differentiable unless gradients are off.

    Raises:
        InvalidInputError: As :func:`divergence`.

    Example:
        >>> laplacian(lambda x: x.pow(3).sum(-1), torch.tensor([1.0, 2.0]))
        tensor(18.)
    """
    check_callable(function, "function", "a function of points")
    if method == "forward":
        slope: VectorField = torch.func.grad(lambda y: function(y).sum())
    else:

        def slope(y: Tensor) -> Tensor:
            return gradient(function, y)

    return divergence(slope, x, method, generator=generator)


def jacobian_contraction(values: Tensor, x: Tensor, directions: Tensor, create_graph: bool = True) -> Tensor:
    r"""Derivatives of evaluated arrays along given directions, by two reverse passes.

    .. math:: \dot h = \sum_j u_j\,\partial_j h(x)

    A reverse pass gives :math:`w^\top\partial h`, linear in :math:`w`; the reverse pass of that is the
    forward derivative. Unlike ``torch.func.jvp`` it works inside any graph and nests.

    Args:
        values: The array ``(..., *k)`` at every point, computed from ``x``.
        x: The points ``(..., d)``, with ``requires_grad``.
        directions: The directions ``(n, ..., d)``.
        create_graph: Whether the result is to be differentiated.

    Returns:
        ``(n, ..., *k)``; zeros where ``values`` doesn't depend on ``x``.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> jacobian_contraction(x.square(), x, torch.ones(1, 1, 2))
        tensor([[[2., 4.]]], grad_fn=<StackBackward0>)
    """
    check_computed(values, x, "values")
    check_type(directions, Tensor, "directions")
    check_nonempty(directions, "directions")
    if not values.is_floating_point():
        raise InvalidInputError("values must be floating", got=values.dtype)
    if directions.shape[1:] != x.shape or directions.dtype != x.dtype:
        raise ShapeError(
            "directions must be like the points",
            got=f"{directions.dtype} {tuple(directions.shape)}",
            expected=f"{x.dtype} (n, *{tuple(x.shape)})",
        )
    # Double backward: the derivative of w -> w^T dh, which is linear in w, along u.
    weights = torch.zeros_like(values, requires_grad=True)
    if not values.requires_grad:
        return values.new_zeros(directions.shape[0], *values.shape)
    product = pull_back(values, x, weights, create_graph=True)
    return torch.stack([pull_back(product, weights, u, create_graph) for u in directions])
