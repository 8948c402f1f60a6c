"""Non-centred paths: a path site becomes a site of independent noise and a deterministic path."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.infer.reparam.reparam import Reparam

from stochdyn.errors import InvalidInputError
from stochdyn.infer.distributions import DiffusionPath, sample_noise

__all__ = ["NoiseReparam"]


class NoiseReparam(Reparam):
    """Reparametrise a :class:`DiffusionPath` site by its driving increments.

    Site ``x`` becomes deterministic; the random sites are ``x_dw``, independent Gaussians, and ``x_0``
    where the start is random. Sampling and mean-field guides mix far better there when the path is long or
    the data are weak.

    Raises:
        InvalidInputError: If the site isn't a :class:`DiffusionPath`, or is observed.

    Example:
        >>> import pyro, torch
        >>> from stochdyn.core import SDE
        >>> def model():
        ...     ts = torch.linspace(0, 1, 5)
        ...     return pyro.sample("x", DiffusionPath(SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts))
        >>> trace = pyro.poutine.trace(pyro.poutine.reparam(model, {"x": NoiseReparam()})).get_trace()
        >>> trace.nodes["x_dw"]["value"].shape
        torch.Size([4, 1])

    Reference:
        Papaspiliopoulos, Roberts and Sköld, "A general framework for the parametrization of hierarchical
        models", 2007.
    """

    def apply(self, msg: Any) -> Any:
        """Replace the path site by a site of independent increments, and make the path deterministic."""
        name, fn = msg["name"], msg["fn"]
        if not isinstance(fn, DiffusionPath):
            raise InvalidInputError(
                "NoiseReparam serves DiffusionPath sites", got=f"site {name!r} of {type(fn).__name__}"
            )
        if msg["is_observed"]:
            raise InvalidInputError("an observed path can't be reparametrised", got=f"site {name!r}")
        x = sample_noise(name, fn)
        return {"fn": dist.Delta(x, event_dim=2), "value": x, "is_observed": True}
