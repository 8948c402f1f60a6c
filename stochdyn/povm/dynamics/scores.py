"""Scores, the gradients of log probabilities sample by sample, from one backward pass through a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Tape", "apply_linear", "apply_norm"]


class Tape:
    r"""Keeps what layers read and wrote in a forward pass, to turn one backward pass into scores.

    A linear layer that wrote :math:`y_{nt} = Wx_{nt}` for sample ``n`` at places ``t`` adds

    .. math:: \nabla_W\log P(a_n) = \sum_t \frac{\partial\log P}{\partial y_{nt}}\,x_{nt}^\top,

    one product of matrices for each sample, which costs as much as the ordinary gradient; no sample is passed through
    the network alone.

    Args:
        samples: The number ``n`` of samples. Tensors that layers read and write have ``n * m`` rows, the samples
            slowest.

    Reference:
        Goodfellow, "Efficient per-example gradient computations", arXiv:1510.01799.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._outputs: list[Tensor] = []
        self._finish: dict[int, Callable[[Tensor], Tensor]] = {}
        self._records: list[tuple[str, tuple[Tensor | None, ...], Tensor | None]] = []

    def _keep(
        self, kind: str, parameters: tuple[Tensor | None, ...], read: Tensor | None, y: Tensor
    ) -> Tensor:
        if y.requires_grad:  # not so where all parameters up to here are frozen
            self._records.append((kind, parameters, read))
            self._outputs.append(y)
        return y

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Apply a linear layer ``(..., in) -> (..., out)`` and remember it."""
        return self._keep(
            "linear", (layer.weight, layer.bias), x.detach(), F.linear(x, layer.weight, layer.bias)
        )

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """Apply a layer normalisation over the last axis and remember it."""
        plain = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        return self._keep(
            "norm", (layer.weight, layer.bias), plain.detach(), plain * layer.weight + layer.bias
        )

    def table(self, layer: nn.Embedding, index: Tensor) -> Tensor:
        """Look rows of a table up and remember it; for small tables."""
        one_hot = F.one_hot(index, layer.num_embeddings).to(layer.weight.dtype)
        return self._keep("table", (layer.weight,), one_hot, one_hot @ layer.weight)

    def rows(self, table: Tensor, index: Tensor) -> Tensor:
        """Look rows ``(*index, K)`` of a large table ``(E, K)`` up and remember which."""
        return self._keep("rows", (table,), index, table[index])

    def positions(self, table: Tensor, rows: int) -> Tensor:
        """Return a table ``(N, width)`` once for each row ``(rows, N, width)`` and remember it."""
        return self._keep("positions", (table,), None, table.expand(rows, *table.shape).clone())

    def custom(self, parameter: Tensor, x: Tensor, y: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """Remember ``y = x @ matrix.T`` of a matrix that is made of a parameter.

        Args:
            parameter: The parameter that the matrix is made of.
            x: The tensor ``(rows, in)`` that was read.
            y: The tensor ``(rows, out)`` that was written.
            finish: A function that turns derivatives by the matrix ``(n, out, in)`` into those by the parameter ``(n,
                numel)``.
        """
        self._finish[id(parameter)] = finish
        return self._keep("custom", (parameter,), x.detach(), y)

    def scores(self, log_prob: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the scores ``(n, P)`` of ``log_prob (n,)``, parameters in the given order.

        The graph of ``log_prob`` is used up.
        """
        slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
            log_prob.sum(), self._outputs, allow_unused=True
        )
        total: dict[int, Tensor] = {}
        for (kind, owned, read), slope in zip(self._records, slopes, strict=True):
            if slope is None:
                continue
            for parameter, value in zip(owned, self._contributions(kind, owned[0], read, slope), strict=True):
                if parameter is not None and parameter.requires_grad:
                    key = id(parameter)
                    value = self._finish[key](value) if key in self._finish else value
                    total[key] = total[key].add_(value) if key in total else value
        n = self.samples
        columns = [
            total[id(p)].reshape(n, -1) if id(p) in total else log_prob.new_zeros(n, p.numel())
            for p in parameters.values()
        ]
        return torch.cat(columns, 1)

    def _contributions(
        self, kind: str, parameter: Tensor | None, read: Tensor | None, slope: Tensor
    ) -> tuple[Tensor, ...]:
        n = self.samples
        if kind == "positions":
            return (slope.reshape(n, -1, *slope.shape[1:]).sum(1),)
        assert read is not None  # for the type checker: all other kinds keep what they read
        g = slope.reshape(n, -1, slope.shape[-1])
        if kind == "rows":
            assert parameter is not None
            entries = parameter.shape[0]
            place = read.reshape(n, -1) + entries * torch.arange(n, device=read.device)[:, None]
            # the derivative by row e of the table is the sum of the slopes where e was looked up
            found = g.new_zeros(n * entries, g.shape[-1])
            return (found.index_add_(0, place.reshape(-1), g.reshape(-1, g.shape[-1])),)
        # sum over places t of the outer product of slope and input, for every sample n at once
        x = read.reshape(n, -1, read.shape[-1])
        if kind == "linear":
            return torch.bmm(g.mT, x), g.sum(1)
        if kind == "custom":
            return (torch.bmm(g.mT, x),)
        if kind == "table":
            return (torch.bmm(x.mT, g),)
        return (g * x).sum(1), g.sum(1)


def apply_linear(layer: nn.Linear, x: Tensor, tape: Tape | None) -> Tensor:
    """Apply a linear layer, on the tape if there is one."""
    return F.linear(x, layer.weight, layer.bias) if tape is None else tape.linear(layer, x)


def apply_norm(layer: nn.LayerNorm, x: Tensor, tape: Tape | None) -> Tensor:
    """Apply a layer normalisation, on the tape if there is one."""
    return (
        F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
        if tape is None
        else (tape.norm(layer, x))
    )
