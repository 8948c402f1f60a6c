"""The recurrent reference ansatz: a stack of gated recurrent units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import check_positive_int
from stochdyn.povm.ansatz.networks import AutoregressiveNetwork
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.dynamics.scores import Tape, apply_linear

__all__ = ["AutoregressiveGRU"]


class AutoregressiveGRU(AutoregressiveNetwork):
    r"""Conditionals from a gated recurrent network that reads the outcomes one by one.

    .. math::
        r,z &= \sigma(U_{rz}x + V_{rz}h),\quad n = \tanh\bigl(U_nx + r\odot V_nh\bigr),\quad h \leftarrow (1-z)\odot n
        + z\odot h

    A step costs the same wherever it is in the string, and needs no memory of earlier ones; correlations between
    distant sites must fit through the state.

    Args:
        num_sites: ``N``.
        layers: number of units stacked.
        width: of the state.
        strings: as in :class:`AutoregressiveAnsatz`.
        shape: of the lattice, for strings that need it.
        num_outcomes: ``K``.
        memory: bytes that caches may use at a time.
        pairs: direct couplings of steps, ``"distance"``, ``"all"`` or None; see :class:`~stochdyn.povm.ansatz.networks.AutoregressiveNetwork`.

    Raises:
        InvalidInputError: if a size isn't positive or the strings are unknown.

    Example:
        >>> net = AutoregressiveGRU(3, layers=1, width=8).double()
        >>> round(float(net.probabilities().sum()), 10)
        1.0

    Reference:
        Carrasquilla, Torlai, Melko and Aolita, Nature Machine Intelligence 1, 155 (2019); the unit is that of Cho et
        al. (2014).
    """

    def __init__(
        self,
        num_sites: int,
        layers: int = 1,
        width: int = 32,
        strings: Strings | str | None = None,
        *,
        shape: Sequence[int] | None = None,
        num_outcomes: int = 4,
        memory: int = 1 << 27,
        pairs: str | None = "distance",
    ) -> None:
        check_positive_int(layers, "layers")
        super().__init__(num_sites, num_outcomes, width, strings, shape, memory, pairs)
        self.embedding = nn.Embedding(num_outcomes + 1, width)
        self.reads = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.recalls = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    @property
    def bytes_per_row(self) -> int:
        """See :meth:`AutoregressiveAnsatz.bytes_per_row`."""
        return 8 * len(self.reads) * self.width * self.reference.element_size()

    def _unit(self, i: int, read: Tensor, h: Tensor, tape: Tape | None) -> Tensor:
        recall = apply_linear(self.recalls[i], h, tape)  # type: ignore[arg-type]
        r, z, n = read.chunk(3, -1)
        vr, vz, vn = recall.chunk(3, -1)
        z = torch.sigmoid(z + vz)
        return torch.lerp(torch.tanh(n + torch.sigmoid(r + vr) * vn), h, z)

    def features(self, tokens: Tensor, tape: Tape | None = None) -> Tensor:
        """See :meth:`AutoregressiveNetwork.features`."""
        x = self.embedding(tokens) if tape is None else tape.table(self.embedding, tokens)
        for i, layer in enumerate(self.reads):
            read = apply_linear(layer, x, tape)  # type: ignore[arg-type]
            h = x.new_zeros(x.shape[0], self.width)
            out = []
            for step in range(x.shape[1]):
                h = self._unit(i, read[:, step], h, tape)
                out.append(h)
            x = torch.stack(out, 1)
        return x

    def start(self, rows: int) -> list[Tensor]:
        """See :meth:`AutoregressiveAnsatz.start`: states ``(rows, width)`` a layer."""
        return [self.reference.new_zeros(rows, self.width) for _ in self.reads]

    def advance(self, cache: list[Tensor], outcomes: Tensor | None, step: int, rows: int) -> Tensor:
        """See :meth:`AutoregressiveNetwork.advance`."""
        if outcomes is None:
            outcomes = torch.full((rows,), self.num_outcomes, device=self.device)
        x = self.embedding(outcomes)
        for i, layer in enumerate(self.reads):
            x = self._unit(i, layer(x), cache[i][:rows], None)
            cache[i][:rows] = x
        return x

    def branch(self, cache: list[Tensor], source: Tensor, target: slice, steps: int) -> None:
        """See :meth:`AutoregressiveAnsatz.branch`."""
        for state in cache:
            state[target] = state[source]
