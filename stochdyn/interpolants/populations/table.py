"""One table of what models and trivial predictions make of populations that were held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stochdyn._checks import as_seed, check_callable, check_mapping, check_nonempty, check_type
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.populations.baselines import population_baselines
from stochdyn.interpolants.populations.compare import PopulationComparison, compare_populations
from stochdyn.interpolants.populations.data import Populations

__all__ = ["PopulationTable", "population_table"]


@dataclass(frozen=True)
class PopulationTable:
    """Predictions of held-out populations by name, and how far each is from what was seen; ``str`` writes it out.

    Attributes:
        comparisons: The comparison of each prediction with the same targets, models first.
        predicted: The predictions themselves, one ``(n_i, d)`` sample for each population.
        metric: The distance, as in :func:`compare_populations`.
    """

    comparisons: dict[str, PopulationComparison]
    predicted: dict[str, list[Tensor]]
    metric: str

    @property
    def best(self) -> str:
        """The name of the prediction whose mean distance is smallest."""
        return min(self.comparisons, key=lambda name: float(self.comparisons[name].distance))

    def against(self, name: str) -> dict[str, Estimate]:
        """Return by how much the others are farther than the prediction of that name, paired by population.

        Args:
            name: The name of the prediction that is held against all others.

        Raises:
            InvalidInputError: If there is none of that name.
        """
        if name not in self.comparisons:
            raise InvalidInputError(
                "no prediction has this name", got=name, expected=", ".join(self.comparisons)
            )
        own = self.comparisons[name]
        return {other: each.minus(own) for other, each in self.comparisons.items() if other != name}

    def __str__(self) -> str:
        first = next(iter(self.comparisons))
        width = max(map(len, self.comparisons))
        gaps = self.against(first)
        lines = [f"{'':{width}}  {self.metric:>8}  above floor       less that of {first}"]
        for name, each in self.comparisons.items():
            gap = gaps.get(name)
            paired = "" if gap is None else f"{float(gap.mean):+.4f} ± {float(gap.stderr):.4f}"
            line = f"{name:{width}}  {float(each.distance):8.4f}  {float(each.excess.mean):.4f} ± {float(each.excess.stderr):.4f}   {paired}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def population_table(
    models: Mapping[str, Callable[..., Tensor]],
    train: Populations,
    test: Populations,
    metric: str = "w1",
    *,
    seed: int = 0,
) -> PopulationTable:
    """Compare models with one another and with the trivial predictions on populations that were held out.

    Beside the models stand the three of :func:`population_baselines`. The fourth baseline has to be trained: give a flow that is blind to
    populations (:class:`PopulationRegression` with ``encoder=None``) as one of the models.

    Args:
        models: The predictions by name, the one of interest first: ``objective.generator().sample``, or any function of the starts of a
            population, ``(n, d)`` to ``(n, d)``, which is given ``treatment=`` if the populations have treatments.
        train: The populations that the models were trained on.
        test: The populations that were held out, with their targets.
        metric: The distance, ``"w1"``, ``"w2"`` or ``"mmd"``, as in :func:`compare_populations`.
        seed: The seed of the halves, which are the same for every prediction.

    Raises:
        InvalidInputError: If a model has the name of a baseline, or the populations differ in whether they have treatments.
        EmptyDataError: If there are no models, or no training population had a treatment that was held out.

    Example:
        >>> starts = [torch.randn(60, 2) + i for i in range(6)]
        >>> train = Populations(starts[:4], [x + 1 for x in starts[:4]])
        >>> test = Populations(starts[4:], [x + 1 for x in starts[4:]])
        >>> table = population_table({"shift by one": lambda x0: x0 + 1}, train, test)
        >>> list(table.comparisons)
        ['shift by one', 'identity', 'mean shift', 'nearest']
        >>> bool(table.against("shift by one")["identity"].mean > 0)
        True
    """
    seed = as_seed(seed)
    check_mapping(models, "models", "predictions by name")
    check_nonempty(models, "models")
    for name, model in models.items():
        check_callable(model, f"models[{name!r}]", "such as objective.generator().sample")
    check_type(train, Populations, "train")
    check_type(test, Populations, "test")
    done: list[Any] = [None] * len(test) if test.treatments is None else list(test.treatments)
    trivial = [population_baselines(train, x, c) for x, c in zip(test.starts, done, strict=True)]
    taken = set(models) & set(trivial[0])
    if taken:
        raise InvalidInputError("a model has the name of a baseline", got=sorted(taken))
    predicted = {
        name: [
            model(x) if c is None else model(x, treatment=c) for x, c in zip(test.starts, done, strict=True)
        ]
        for name, model in models.items()
    }
    predicted |= {name: [each[name] for each in trivial] for name in trivial[0]}
    found = {
        name: compare_populations(group, test.targets, metric, generator=seed)
        for name, group in predicted.items()
    }
    return PopulationTable(found, predicted, metric)
