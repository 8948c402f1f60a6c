"""The full table: one parameter for each outcome string, for tests and as the ansatz without an ansatz error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn.core.forward.outcomes import decode, encode
from stochdyn.povm.ansatz.base import Ansatz

__all__ = ["FullTable"]

_MAX_ENTRIES = 1 << 16


class FullTable(Ansatz):
    r"""A softmax over all strings.

    .. math:: P(a) = e^{\lambda_a}\big/\sum_be^{\lambda_b}

    Every positive law is one of its members, so what is left of the error is that of the method. When would I use this?
    For up to eight qubits: to tell the error of a method or of its steps from that of an ansatz, and to fit a state to
    records without any assumption on its form.

    Args:
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.

    Raises:
        SystemSizeError: If there are over 65536 strings.

    Example:
        >>> FullTable(2).log_prob(torch.zeros(1, 2, dtype=torch.long)).exp()
        tensor([0.0625], grad_fn=<ExpBackward0>)
    """

    def __init__(self, num_sites: int, num_outcomes: int = 4) -> None:
        super().__init__(num_sites, num_outcomes)
        self.check_listable(_MAX_ENTRIES)
        self.logits = nn.Parameter(torch.zeros(num_outcomes**num_sites))

    def log_prob(self, a: Tensor) -> Tensor:
        """Return log probabilities ``(*batch)`` of outcomes ``(*batch, N)`` by looking them up."""
        rows, batch = self.rows_of(a)
        return self.logits.log_softmax(0)[encode(rows, self.num_outcomes)].reshape(batch)

    def scores(self, a: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return log probabilities and scores, :math:`\partial_b\log P(a)=\delta_{ab}-P(b)`."""
        self.check_outcomes(a)
        code = encode(a, self.num_outcomes)
        with torch.no_grad():
            log_p = self.logits.log_softmax(0)
            scores = (-log_p.exp()).repeat(a.shape[0], 1)
            # d log P(a) / d lambda_b = delta_ab - P(b)
            scores[torch.arange(a.shape[0], device=a.device), code] += 1
        return log_p[code], scores

    def draw(self, n: int, generator: torch.Generator | None, stratified: bool) -> tuple[Tensor, Tensor]:
        """Draw outcomes from the table by inverting its cumulative sum."""
        log_p = self.logits.log_softmax(0)
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=self.device)
        if stratified:
            # draw j comes from the j-th of n equal parts of the unit interval
            u = (torch.arange(n, dtype=torch.float64, device=self.device) + u) / n
        upper = log_p.double().exp().cumsum(0)
        code = torch.searchsorted(upper / upper[-1], u).clamp(max=len(log_p) - 1)
        return decode(code, self.num_sites, self.num_outcomes), log_p[code]

    def set_site_probabilities(self, p: Tensor) -> None:
        """Fill the table with a product of single-site laws."""
        # log of the Kronecker product of the site laws, the first site slowest
        joint = torch.zeros(1, dtype=torch.float64)
        for row in p.double().log():
            joint = (joint[:, None] + row).reshape(-1)
        with torch.no_grad():
            self.logits.copy_(joint)
