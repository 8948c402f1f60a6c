"""The causal transformer over outcome strings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn.povm.ansatz.networks import AutoregressiveNetwork, check_divisible
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.dynamics.scores import Tape, apply_linear, apply_norm
from stochdyn.povm.frames.sizes import check_size

__all__ = ["AutoregressiveTransformer"]


class AutoregressiveTransformer(AutoregressiveNetwork):
    r"""A causal transformer that gives each outcome's probability from those before it.

    .. math::
        x &\leftarrow x + \operatorname{Attention}(\operatorname{norm}x)\\
        x &\leftarrow x + W_2\operatorname{gelu}(W_1\operatorname{norm}x)

    for every layer, then a normalisation and the head of
    :class:`~stochdyn.povm.ansatz.networks.AutoregressiveNetwork`. Step ``i`` attends to steps ``0..i`` in scoring and in
    sampling alike, so both follow one law at every depth. When would I use this? To begin with on lattices of up to some
    twenty sites, and wherever correlations reach far; the cost of a draw grows with the square of the number of sites.

    Args:
        num_sites: The number ``N`` of sites.
        layers: The number of layers.
        width: The size of the embedding of an outcome.
        heads: The number of attention heads, which must divide ``width``.
        strings: The order of the sites, or the set of orders to average over, as in :class:`AutoregressiveAnsatz`.
        shape: The sizes of the lattice, for strings that need them.
        num_outcomes: The number ``K`` of outcomes of a site, 4 for qubits in a minimal frame.
        feedforward: The inner width of the second half of a layer; twice the width if None.
        memory: The number of bytes that caches may use at a time.
        pairs: The direct couplings of pairs of steps, ``"distance"``, ``"all"`` or None, as in
            :class:`~stochdyn.povm.ansatz.networks.AutoregressiveNetwork`.

    Raises:
        InvalidInputError: If a size isn't positive, ``heads`` doesn't divide ``width`` or the strings are unknown.
        ShapeError: If the strings don't fit.

    Example:
        >>> net = AutoregressiveTransformer(3, layers=1, width=8, heads=2, strings="translations").double()
        >>> round(float(net.probabilities().sum()), 10)
        1.0
        >>> a, log_p = net.sample(5, generator=torch.Generator().manual_seed(0))
        >>> a.shape, bool((log_p - net.log_prob(a)).abs().max() < 1e-10)
        (torch.Size([5, 3]), True)

    Reference:
        Luo, Chen, Carrasquilla and Clark, Phys. Rev. Lett. 128, 090501 (2022); the layer is that of Vaswani et al.
        (2017) with the normalisation first.
    """

    def __init__(
        self,
        num_sites: int,
        layers: int = 2,
        width: int = 32,
        heads: int = 4,
        strings: Strings | str | None = None,
        *,
        shape: Sequence[int] | None = None,
        num_outcomes: int = 4,
        feedforward: int | None = None,
        memory: int = 1 << 27,
        pairs: str | None = "distance",
    ) -> None:
        check_size(layers, "layers", 256)
        super().__init__(num_sites, num_outcomes, width, strings, shape, memory, pairs)
        check_divisible(width, heads)
        inner = 2 * width if feedforward is None else feedforward
        check_size(inner, "feedforward", 1 << 16)
        self.heads = heads
        self.embedding = nn.Embedding(num_outcomes + 1, width)
        self.positions = nn.Parameter(_waves(num_sites, width))
        self.layers = nn.ModuleList(_Layer(width, heads, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    @property
    def bytes_per_row(self) -> int:
        """The number of bytes that evaluating one string takes."""
        return 2 * len(self.layers) * self.num_sites * self.width * self.reference.element_size()

    def features(self, tokens: Tensor, tape: Tape | None = None) -> Tensor:
        """Return the features ``(rows, N, width)`` of all steps by causal attention."""
        if tape is None:
            x = self.embedding(tokens) + self.positions
        else:
            x = tape.table(self.embedding, tokens) + tape.positions(self.positions, tokens.shape[0])
        for layer in self.layers:
            x = layer(x, tape)
        return apply_norm(self.norm, x, tape)

    def start(self, rows: int) -> list[Tensor]:
        """Return an empty cache for keys and values ``(2, rows, heads, N, width / heads)`` for each layer."""
        shape = (2, rows, self.heads, self.num_sites, self.width // self.heads)
        return [self.reference.new_empty(shape) for _ in self.layers]

    def advance(self, cache: list[Tensor], outcomes: Tensor | None, step: int, rows: int) -> Tensor:
        """Return the features of the next step, and keep its keys and values."""
        if outcomes is None:
            outcomes = torch.full((rows,), self.num_outcomes, device=self.device)
        x = (self.embedding.weight + self.positions[step])[outcomes]
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer.advance(x, kept[:, :rows], step)  # type: ignore[operator]
        return apply_norm(self.norm, x, None)

    def branch(self, cache: list[Tensor], source: Tensor, target: slice, steps: int) -> None:
        """Copy the keys and values of the first steps from some rows to others."""
        for kept in cache:
            kept[:, target, :, :steps] = kept[:, source, :, :steps]


class _Layer(nn.Module):
    """Attention to earlier steps, then two linear layers, each with a normalisation before and a bypass."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)

    def _feedforward(self, x: Tensor, tape: Tape | None) -> Tensor:
        h = apply_norm(self.norm_feedforward, x, tape)
        return x + apply_linear(self.narrow, F.gelu(apply_linear(self.widen, h, tape)), tape)

    def forward(self, x: Tensor, tape: Tape | None) -> Tensor:
        """All steps at once, ``(m, N, width)``."""
        m, sites, width = x.shape
        joint = apply_linear(self.project, apply_norm(self.norm_attention, x, tape), tape)
        # causal attention, softmax(q k^T / sqrt(size)) v over the steps up to the present one
        q, k, v = joint.reshape(m, sites, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        mask = torch.ones(sites, sites, dtype=torch.bool, device=x.device).triu(1)
        # written out, since the fused attention has no rule for torch.func.vmap
        weight = (q @ k.mT / math.sqrt(self.size)).masked_fill(mask, -torch.inf).softmax(-1)
        read = (weight @ v).transpose(1, 2).reshape(m, sites, width)
        return self._feedforward(x + apply_linear(self.join, read, tape), tape)

    def advance(self, x: Tensor, kept: Tensor, step: int) -> Tensor:
        """One step ``(rows, width)``, with the keys and values of earlier ones in ``kept``."""
        rows, width = x.shape
        joint = apply_linear(self.project, apply_norm(self.norm_attention, x, None), None)
        q, kept[0, :, :, step], kept[1, :, :, step] = joint.reshape(rows, 3, self.heads, self.size).unbind(1)
        k, v = kept[0, :, :, : step + 1], kept[1, :, :, : step + 1]
        weight = ((k @ q[..., None])[..., 0] / math.sqrt(self.size)).softmax(-1)
        read = (weight[:, :, None] @ v).reshape(rows, width)
        return self._feedforward(x + apply_linear(self.join, read, None), None)


def _waves(sites: int, width: int) -> Tensor:
    """Sines and cosines of geometrically spaced frequencies, from which positions start to learn."""
    # Vaswani et al. (2017), section 3.5, with wavelengths from 2 pi to 2 pi times four lattice lengths
    place = torch.arange(sites)[:, None]
    rate = torch.exp(-math.log(4.0 * sites) * torch.arange(0, width, 2) / width)
    table = torch.zeros(sites, width)
    table[:, 0::2] = torch.sin(place * rate)
    table[:, 1::2] = torch.cos(place * rate)[:, : width // 2]
    return table
