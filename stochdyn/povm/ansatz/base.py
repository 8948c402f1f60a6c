"""The contract of variational states: normalised laws over outcome strings that can be sampled and scored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_generator, as_integers, as_sample_shape, check_bool, check_type
from stochdyn._transforms import maps_are_active, recording
from stochdyn.core.forward.outcomes import all_configurations
from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.products import site_states
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.frames.sizes import check_size

if TYPE_CHECKING:
    from stochdyn.povm.ansatz.outcome_distribution import OutcomeDistribution

__all__ = ["Ansatz"]

_MAX_LISTED = 1 << 20
_MAX_DRAWS, _MAX_SITES, _MAX_OUTCOMES = 1 << 26, 1 << 14, 1 << 10


class Ansatz(nn.Module, ABC):
    r"""A normalised law :math:`P_\theta(a)` over strings of outcomes, ``N`` sites with ``K`` outcomes each.

    Subclasses implement :meth:`log_prob`, :meth:`draw` and :meth:`set_site_probabilities`; :meth:`scores` has a default
    for any network. Everything in this package works with any ansatz.

    Attributes:
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.
    """

    def __init__(self, num_sites: int, num_outcomes: int) -> None:
        check_size(num_sites, "num_sites", _MAX_SITES)
        check_size(num_outcomes, "num_outcomes", _MAX_OUTCOMES, 2)
        super().__init__()
        self.num_sites, self.num_outcomes = int(num_sites), int(num_outcomes)

    @abstractmethod
    def log_prob(self, a: Tensor) -> Tensor:
        """Return normalised log probabilities ``(n,)`` of integer outcomes ``(n, N)``.

        The states of this package take outcomes ``(*batch, N)`` in any form too; see :meth:`rows_of`.
        """

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator | None, stratified: bool) -> tuple[Tensor, Tensor]:
        """Draw ``n`` strings ``(n, N)`` and return them with their log probabilities ``(n,)``; see :meth:`sample`."""

    def sample(
        self,
        sample_shape: int | Sequence[int] = 1,
        generator: torch.Generator | int | None = None,
        *,
        stratified: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Draw strings.

        Args:
            sample_shape: The number of independent draws, or their shape.
            generator: The source of randomness; torch's global one if None.
            stratified: Whether to divide the unit interval evenly between the draws. Every draw has the same law, and
                means over them are unbiased, but they aren't independent, come in order, and vary less.

        Returns:
            Outcomes ``(*sample_shape, N)`` and their log probabilities ``(*sample_shape)``, without gradients.

        Raises:
            InvalidInputError: If a size isn't a positive integer.
        """
        shape = as_sample_shape(sample_shape)
        check_bool(stratified, "stratified")
        source = as_generator(generator, self.device)
        size = math.prod(shape)
        check_size(size, "sample_shape", _MAX_DRAWS)
        with torch.no_grad():
            a, log_p = self.draw(size, source, stratified)
        return a.reshape(*shape, self.num_sites), log_p.reshape(shape)

    @abstractmethod
    def set_site_probabilities(self, p: Tensor) -> None:
        """Become exactly the product law with the outcome probabilities ``p (N, K)`` on the sites."""

    @property
    def symmetry(self) -> Strings | None:
        """The group of strings under which the law is invariant, if there is one."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parameters, and so of the log probabilities."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def set_product_state(self, povm: Any, state: Any) -> Ansatz:
        """Become a product state exactly, whatever the parameters were.

        Args:
            povm: The frame, or one for each site.
            state: A name such as ``"up"`` or ``"x+"``, a vector or a density matrix of one site, for all sites; or a
                list with one of these for each site.

        Returns:
            The ansatz itself.

        Raises:
            ZeroProbabilityError: If an outcome never happens in the state; the message names a frame to use.
            InvalidInputError: If there isn't one state for each site.
        """
        check_type(povm, (Frame, SiteFrames), "povm", hint="such as stochdyn.povm.Tetrahedral()")
        sites = getattr(povm, "num_sites", self.num_sites)
        if sites != self.num_sites:
            raise InvalidInputError(
                "frame and ansatz differ in their number of sites", got=sites, expected=self.num_sites
            )
        each = site_states(state, self.num_sites)
        rows = [povm.at(i).positive_probabilities(s) for i, s in enumerate(each)]
        if any(len(row) != self.num_outcomes for row in rows):
            raise InvalidInputError(
                "the frame and the ansatz differ in their number of outcomes",
                got=len(rows[0]),
                expected=self.num_outcomes,
                hint="give num_outcomes to the ansatz",
            )
        self.set_site_probabilities(torch.stack(rows))
        return self

    def log_ratios(self, a: Tensor, shifts: Tensor) -> Tensor | None:
        r"""Return :math:`\log P(a+s)-\log P(a)` ``(n, M)``, or None where whole strings are evaluated as fast.

        Args:
            a: The outcomes ``(n, N)`` to start from.
            shifts: The numbers ``(M, N)`` that are added to the outcomes, modulo ``K``.
        """
        del a, shifts
        return None

    def scores(self, a: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return log probabilities ``(n,)`` and scores :math:`\nabla_\theta\log P_\theta(a)` ``(n, P)``.

        Parameters are those that require gradients, in the order of :meth:`parameter_vector`.
        """
        named = dict(self.trainable())
        fixed = {k: v for k, v in self.state_dict(keep_vars=True).items() if k not in named}

        def one(parameters: dict[str, Tensor], string: Tensor) -> tuple[Tensor, Tensor]:
            value = torch.func.functional_call(self, (parameters, fixed), (string[None],))[0]
            return value, value.detach()

        detached = {k: v.detach() for k, v in named.items()}
        with recording():
            gradients, log_prob = torch.func.vmap(torch.func.grad(one, has_aux=True), (None, 0))(detached, a)
        return log_prob, torch.cat([gradients[k].reshape(a.shape[0], -1) for k in named], 1)

    def combined_scores(self, a: Tensor, coefficients: Tensor) -> Tensor:
        r"""Return sums of scores :math:`\sum_kc_{mk}\nabla\log P(a_{mk})` ``(m, P)``.

        Args:
            a: The outcomes ``(m, k, N)`` whose scores are summed.
            coefficients: The coefficients ``(m, k)`` of the sums.
        """
        rows = []
        for part, c in zip(a, coefficients, strict=True):
            scores = self.scores(part)[1]
            rows.append(c.to(scores.dtype) @ scores)
        return torch.stack(rows)

    def forward(self, a: Tensor) -> Tensor:
        """Return :meth:`log_prob`."""
        return self.log_prob(a)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return names and values of the parameters that require gradients."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def parameter_vector(self) -> Tensor:
        """Return a copy of all trainable parameters as one vector ``(P,)``."""
        return torch.cat([p.detach().reshape(-1) for _, p in self.trainable()])

    def set_parameter_vector(self, vector: Tensor) -> None:
        """Put the trainable parameters to those of a vector ``(P,)``."""
        check_type(vector, Tensor, "vector")
        sizes = [p.numel() for _, p in self.trainable()]
        if vector.shape != (sum(sizes),):
            raise ShapeError(
                "the vector has the wrong length", got=tuple(vector.shape), expected=(sum(sizes),)
            )
        with torch.no_grad():
            for (_, p), part in zip(self.trainable(), vector.split(sizes), strict=True):
                p.copy_(part.reshape(p.shape))

    def probabilities(self) -> Tensor:
        """Return the probabilities ``(K**N,)`` of all outcomes, the first site slowest.

        Raises:
            SystemSizeError: If there are over 2**20 outcomes.
        """
        self.check_listable()
        with torch.no_grad():
            return self.log_prob(all_configurations(self.num_sites, self.num_outcomes, self.device)).exp()

    def check_listable(self, limit: int = _MAX_LISTED) -> None:
        """Raise unless all outcomes can be listed."""
        if self.num_outcomes**self.num_sites > limit:
            raise SystemSizeError(
                "there are too many outcomes to sum over",
                got=f"{self.num_outcomes}**{self.num_sites}",
                expected=f"at most {limit}",
                hint="pass num_samples to estimate by sampling",
            )

    def rows_of(self, a: Any) -> tuple[Tensor, torch.Size]:
        """Return outcomes ``(*batch, N)``, as a tensor, an array or lists, as rows ``(n, N)`` and the shape of the batch.

        Raises:
            InvalidInputError: If they aren't integers in range.
            ShapeError: If there isn't one outcome for each site.
        """
        if not isinstance(a, Tensor):
            a = as_integers(a, "outcomes").to(self.device)
        if a.ndim != 2 and a.ndim and a.shape[-1] == self.num_sites:
            rows = a.reshape(-1, self.num_sites)
        else:
            rows = a
        self.check_outcomes(rows)
        return rows, a.shape[:-1]

    def check_outcomes(self, a: Tensor) -> None:
        """Raise unless ``a`` are integer outcomes ``(n, N)`` in range."""
        check_type(a, Tensor, "outcomes")
        if a.is_floating_point() or a.is_complex() or a.dtype == torch.bool:
            raise InvalidInputError("outcomes must be integers", got=a.dtype)
        if a.ndim != 2 or a.shape[1] != self.num_sites:
            raise ShapeError(
                "outcomes must be (n, N)", got=f"shape {tuple(a.shape)}", expected=f"(n, {self.num_sites})"
            )
        if maps_are_active():
            return  # values can't be looked at inside vmap
        if a.numel() and (int(a.min()) < 0 or int(a.max()) >= self.num_outcomes):
            raise InvalidInputError(
                "an outcome is out of range",
                got=f"{int(a.min())} to {int(a.max())}",
                expected=f"0 to {self.num_outcomes - 1}",
            )

    def distribution(self, validate_args: bool | None = None) -> OutcomeDistribution:
        """Return the law as a Pyro distribution over outcome strings, with event ``(N,)``."""
        from stochdyn.povm.ansatz.outcome_distribution import OutcomeDistribution

        return OutcomeDistribution(self, validate_args=validate_args)


def as_strings(strings: Strings | str | None, num_sites: int, shape: Sequence[int] | None) -> Strings:
    """Return strings from what users give: an object, the name of a set, or None for the natural order."""
    if isinstance(strings, Strings):
        chosen = strings
    elif strings is None:
        chosen = Strings.identity(num_sites)
    elif not isinstance(strings, str):
        raise InvalidInputError(
            "strings has the wrong type", got=type(strings).__name__, expected="a name or Strings"
        )
    elif strings == "translations":
        chosen = Strings.translations(shape if shape is not None else num_sites, reflections=False)
    elif strings == "translations+reflections":
        chosen = Strings.translations(shape if shape is not None else num_sites)
    elif strings == "reflections":
        chosen = Strings.reflection(num_sites)
    elif strings in ("snake", "snakes"):
        grid = shape if shape is not None else _square(num_sites, strings)
        chosen = Strings.snake(grid) if strings == "snake" else Strings.snakes(grid)
    else:
        raise InvalidInputError(
            "strings is unknown",
            got=repr(strings),
            expected="None | 'translations' | 'translations+reflections' | 'reflections' | 'snake' | 'snakes' | Strings",
        )
    if chosen.num_sites != num_sites:
        raise ShapeError(
            "the strings don't fit the ansatz", got=f"{chosen.num_sites} sites", expected=num_sites
        )
    return chosen


def _square(num_sites: int, strings: str) -> tuple[int, int]:
    side = round(num_sites**0.5)
    if side * side != num_sites:
        raise InvalidInputError(
            f"strings={strings!r} needs the shape of the lattice",
            got=f"{num_sites} sites",
            hint="pass shape=(rows, columns)",
        )
    return side, side
