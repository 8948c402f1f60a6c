"""Where samplers start: a given law, the starts seen in training, or the standard normal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from stochdyn._checks import check_positive_int
from stochdyn.core.law.initial import DistributionStart
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError

__all__ = ["Starts", "standard_normal"]

_KEPT = 20_000


def standard_normal(dim: int, like: Tensor | None = None) -> Distribution:
    """Return the standard normal on ``dim`` dimensions, in the precision and on the device of ``like``."""
    zeros = torch.zeros(dim) if like is None else like.new_zeros(dim)
    return Independent(Normal(zeros, torch.ones_like(zeros)), 1)


class Starts(nn.Module):
    r"""The law :math:`\rho_0` of a model.

    Where no law is given and training came with starts of its own, these are kept (up to 20 000, of the first batches)
    and drawn from again. A density is then available only if they look standard normal: mean, covariance and
    mean fourth power of the radius within five standard errors.

    Args:
        base: a distribution with event ``(d,)``, or None.
        normal: whether the path starts in the standard normal by definition.

    Raises:
        InvalidInputError: if ``base`` isn't a distribution.
        ShapeError: if its event isn't a vector.
    """

    def __init__(self, base: Any = None, normal: bool = False) -> None:
        super().__init__()
        if base is not None and not isinstance(base, Distribution):
            raise InvalidInputError("base must be a distribution with event (d,)", got=type(base).__name__)
        if base is not None and len(base.event_shape) != 1:
            raise ShapeError(
                "base must have a vector event", got=f"event shape {tuple(base.event_shape)}", expected="(d,)"
            )
        self.base, self.normal = base, normal
        self._seen: Tensor | None = None
        self._like: Tensor | None = None
        self._full = False

    def observe(self, x0: Tensor, given: bool) -> None:
        """Note a batch of starts; ``given`` tells those of the data from those that were drawn here."""
        if self._full:
            return
        self._like = x0.detach()[:1]
        if self.base is not None or self.normal or not given:
            self._full = True
            return
        x = x0.detach().reshape(-1, x0.shape[-1])
        self._seen = x[:_KEPT].clone() if self._seen is None else torch.cat([self._seen, x])[:_KEPT]
        self._full = self._seen.shape[0] >= _KEPT

    @property
    def dim(self) -> int | None:
        """Dimension, if known yet."""
        if self.base is not None:
            return int(self.base.event_shape[0])
        return None if self._like is None else self._like.shape[-1]

    def law(self, dim: int | None = None, like: Tensor | None = None) -> Distribution:
        """Return the law with a density.

        Raises:
            UnavailableError: if it isn't known.
        """
        if self.base is not None:
            return self.base
        dim = self.dim if dim is None else dim
        if dim is None:
            raise UnavailableError("the law of the starts isn't known", hint="pass base=..., or train first")
        if self._seen is not None and not looks_normal(self._seen):
            raise UnavailableError(
                "the starts in the data aren't standard normal, and their density isn't known",
                hint="pass base=... to InterpolantRegression: a distribution with log_prob",
            )
        return standard_normal(dim, self._like if like is None else like)

    def draw(
        self,
        n: int,
        dim: int | None = None,
        generator: torch.Generator | None = None,
        like: Tensor | None = None,
    ) -> Tensor:
        """Return ``n`` starts ``(n, d)``.

        Raises:
            UnavailableError: if nothing is known about them.
        """
        check_positive_int(n, "n")
        if self.base is None and self._seen is not None and not looks_normal(self._seen):
            pick = torch.randint(len(self._seen), (n,), generator=generator, device=self._seen.device)
            return self._seen[pick]
        law = self.law(dim, like)
        with torch.no_grad():
            return DistributionStart(law).draw((n,), generator)


def looks_normal(x: Tensor) -> bool:
    """Return whether the first moments of a sample ``(n, d)`` are those of a standard normal, within five errors.

    Example:
        >>> looks_normal(torch.randn(1000, 3)), looks_normal(torch.rand(1000, 3))
        (True, False)
    """
    n, d = x.shape
    if n < 20:
        return False
    x = x.double()
    mean = x.mean(0)
    covariance = x.mT @ x / n
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    variances = torch.ones_like(covariance) + eye
    fourth = x.square().sum(-1).square()
    radius = d * (d + 2)
    # variance of |x|^4 under the standard normal
    spread = math.prod(d + 2 * k for k in range(4)) - radius**2
    # several comparisons at once: the largest of many deviations is allowed a little more
    bound = 5.0 + math.log(1 + d)
    return (
        bool((mean.abs() * n**0.5 < bound).all())
        and bool((((covariance - eye).abs() / variances.sqrt()) * n**0.5 < bound).all())
        and abs(float(fourth.mean()) - radius) < bound * (spread / n) ** 0.5
    )
