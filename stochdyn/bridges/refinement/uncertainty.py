"""Posteriors over the parameters of a refined reference: by bootstrap, or by variational inference with latent paths."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_positive_int
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.refinement.identifiability import (
    check_information,
    rotation_invariance,
    warn_if_invariant,
)
from stochdyn.bridges.refinement.linear_response import LinearResponse, flatten, with_coordinates
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    StochdynError,
    UnknownSiteError,
)

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = ["bootstrap", "families_of", "posterior"]

COORDINATES = "coordinates"
_MAX_LINEAR = 30


def posterior(
    fit: Refinement,
    num_draws: int = 100,
    method: str = "bootstrap",
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Any:
    r"""Return an ArviZ posterior over the parameters of a refined reference.

    Two answers of different meaning; the container's attribute ``estimator`` says which was asked for:

    - ``"bootstrap"``: particles of every snapshot are redrawn with replacement, and the refinement follows (:func:`bootstrap`). It
      shows how estimates scatter over data sets, whatever the model's errors.
    - ``"svi"``: variational inference of the parameters with the law of the paths as latent variable
      (:class:`~stochdyn.bridges.refinement.profile.BridgeProfile`), put through :func:`stochdyn.to_inference_data`, densities and weights
      included; priors act.

    Paths are latent in both. A regression on the bridge's paths as if they had been seen would be overconfident.

    Args:
        fit: what :func:`stochdyn.bridges.refine` returned.
        num_draws: draws.
        method: ``"bootstrap"`` or ``"svi"``.
        seed: of the draws.
        progress: show a bar.
        options: further arguments of :func:`bootstrap` or of :func:`stochdyn.bridges.refinement.profile.fit_profile`.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x. ``posterior`` holds the parameters by name and, as
        ``coordinates``, the raw values that :func:`families_of` reads.

    Raises:
        InvalidInputError: for an unknown method, or more parameters than the method can take.

    Warns:
        ApproximationWarning: if the marginals leave a rotation undetermined, or hold hardly any information on a combination of
            parameters.

    Example:
        >>> from stochdyn.bridges import LinearDrift, Snapshots, refine
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] * 0.5**i + i for i in range(3)]
        >>> fit = refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), diffusion=0.3)
        >>> idata = posterior(fit, num_draws=50)
        >>> idata.attrs["estimator"], dict(idata.posterior["matrix"].sizes)["draw"]
        ('bootstrap', 50)
    """
    check_positive_int(num_draws, "num_draws")
    check_choice(method, ("bootstrap", "svi"), "method")
    warn_if_invariant(rotation_invariance(fit.snapshots), stacklevel=4)
    if method == "svi":
        from stochdyn.bridges.refinement.profile import fit_profile

        return fit_profile(fit, seed=seed, progress=progress, **options).posterior(num_draws, seed)
    return bootstrap(fit, num_draws, seed, progress, **options)


def bootstrap(
    fit: Refinement,
    num_draws: int = 100,
    seed: int = 0,
    progress: bool = False,
    *,
    refit: str = "auto",
    outer: int = 5,
    nodes: int | None = 40_000,
    centre: bool = False,
) -> Any:
    r"""Redraw the particles of every snapshot with replacement and follow the refinement.

    Args:
        fit: what :func:`stochdyn.bridges.refine` returned.
        num_draws: data sets.
        seed: of the redrawing.
        progress: show a bar.
        refit: how the refinement follows. ``"full"``: it is repeated from the fit, at a few bridges a draw. ``"linear"``: by its
            linear response to the weights (:class:`~stochdyn.bridges.refinement.linear_response.LinearResponse`), at a few bridges a
            *parameter* and milliseconds a draw, for families without prior. ``"auto"``: linear where it can be, up to thirty parameters and
            with known diffusion.
        outer: iterations for each data set, at most (``"full"``).
        nodes: states that a projection sees (``"full"``); those of the fit if None.
        centre: correct for the bias that noise causes: redrawing adds it once more, so draws are moved by twice their mean
            deviation from the fit.

    Returns:
        The container that :func:`posterior` describes. ``sample_stats`` holds ``objective`` for full refits; attributes are ``refit``
        and ``failed``, the number of data sets that no bridge could be built on.

    Raises:
        InvalidInputError: if more than half of the data sets fail, or a linear response isn't to be had.

    Reference: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapters 6 and 10.
    """
    check_positive_int(num_draws, "num_draws")
    check_positive_int(outer, "outer")
    check_choice(refit, ("auto", "linear", "full"), "refit")
    generator = torch.Generator(fit.snapshots.device).manual_seed(seed)
    size = flatten(fit.family).numel()
    simple = size <= _MAX_LINEAR and fit.family.log_prior() is None and not fit.options["learn_diffusion"]
    if refit == "linear" or (refit == "auto" and simple):
        if fit.options["learn_diffusion"]:
            raise InvalidInputError(
                "the response of a learned diffusion isn't known", hint="use refit='full'"
            )
        response = LinearResponse(fit)
        check_information(response, stacklevel=4)
        draws, centre_at = response(redrawn_weights(fit.snapshots, num_draws, generator)), response.converged
        extra: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        failed, how = 0, "linear"
    else:
        draws, extra, stats, failed = _refits(fit, num_draws, generator, outer, nodes, progress)
        centre_at, how = flatten(fit.family), "full"
    if centre:
        draws = draws - 2 * (draws.mean(0) - centre_at)
    return _container(fit, draws, extra, stats, {"seed": seed, "failed": failed, "refit": how})


def redrawn_weights(snapshots: Snapshots, num: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return multiplicities ``(num, n_i)`` of a bootstrap as normalised weights, one tensor a snapshot."""
    everything = []
    for own in snapshots.weights:
        count = len(own)
        index = torch.multinomial(own.expand(num, -1), count, replacement=True, generator=generator)
        hits = torch.zeros(num, count, dtype=own.dtype, device=own.device)
        everything.append(hits.scatter_add_(1, index, torch.ones_like(index, dtype=own.dtype)) / count)
    return everything


def _refits(
    fit: Refinement,
    num_draws: int,
    generator: torch.Generator,
    outer: int,
    nodes: int | None,
    progress: bool,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    from tqdm.auto import tqdm

    from stochdyn.bridges.refinement.refinement import refine

    options = {**fit.options, "outer": outer, "start": "family", "restarts": 0}
    options["diffusion"] = fit.measure.diffusion
    if nodes is not None:
        options["nodes"] = min(nodes, int(options["nodes"]))
    coordinates: list[Tensor] = []
    diffusion, objective, failed = [], [], 0
    with tqdm(total=num_draws, disable=not progress, desc="bootstrap") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        while len(coordinates) < num_draws:
            again = fit.snapshots.resample(generator)
            try:
                found = refine(again, fit.family, **options)
            except StochdynError as error:
                failed += 1
                if failed > max(num_draws // 2, 3):
                    raise InvalidInputError(
                        "refinements of redrawn snapshots keep failing",
                        got=f"{failed} of {failed + len(coordinates)}",
                    ) from error
                continue
            coordinates.append(flatten(found.family))
            diffusion.append(found.measure.spread.diagonal().mean().sqrt().double())
            objective.append(found.objective)
            bar.update()
    extra = {"diffusion": torch.stack(diffusion)} if options["learn_diffusion"] else {}
    return torch.stack(coordinates), extra, {"objective": torch.tensor(objective)}, failed


def families_of(
    fit: Refinement, idata: Any, num: int | None = None, generator: torch.Generator | None = None
) -> list[DriftFamily]:
    """Return families with parameters drawn from a posterior of :func:`posterior`.

    Args:
        fit: what the posterior belongs to.
        idata: the container.
        num: how many, drawn with replacement; every draw once if None.
        generator: source of randomness.

    Raises:
        UnknownSiteError: if the container has no coordinates.
        InvalidInputError: if they are of another family.
    """
    if COORDINATES not in idata.posterior:
        raise UnknownSiteError(f"the posterior has no variable {COORDINATES!r}: take one of fit.posterior()")
    values = torch.as_tensor(idata.posterior[COORDINATES].values.copy())
    draws = values.reshape(-1, values.shape[-1])
    size = flatten(fit.family).numel()
    if draws.shape[1] != size:
        raise InvalidInputError("the posterior is of another family", got=draws.shape[1], expected=size)
    if num is not None:
        check_positive_int(num, "num")
        draws = draws[torch.randint(len(draws), (num,), generator=generator)]
    return [with_coordinates(fit.family, row) for row in draws]


def _container(
    fit: Refinement,
    draws: Tensor,
    extra: dict[str, Tensor],
    stats: dict[str, Tensor],
    attrs: dict[str, str | int | float],
) -> Any:
    from stochdyn.diagnostics.container import from_draws

    if not bool(torch.isfinite(draws).all()):
        raise NonFiniteError("a draw isn't finite", hint="see whether the snapshots determine all parameters")
    rows = [with_coordinates(fit.family, row).named_values() for row in draws]
    variables = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    arrays = {name: value.cpu().numpy()[None] for name, value in {**variables, **extra}.items()}
    arrays[COORDINATES] = draws.cpu().numpy()[None]
    return from_draws(
        arrays,
        sample_stats={name: value.numpy()[None] for name, value in stats.items()},
        constant_data={"times": fit.snapshots.times.cpu().numpy()},
        attrs={"estimator": "bootstrap", **attrs},
    )
