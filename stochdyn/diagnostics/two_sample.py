"""Whether a classifier can tell two samples apart."""

from __future__ import annotations

import warnings

import torch

from stochdyn._checks import as_seed, check_event_size, check_nonempty, check_positive_int
from stochdyn.core.law.path import Estimate
from stochdyn.diagnostics.metrics import Values, _samples
from stochdyn.errors import TooFewDrawsError

__all__ = ["c2st"]


def c2st(x: Values, y: Values, folds: int = 5, width: int | None = None, seed: int = 0) -> Estimate:
    r"""Return the accuracy with which a network tells two samples apart: 0.5 if it can't, 1 if it always can.

    The network is trained on all but one part of both samples and asked about that part, for every part. It is the customary
    score of simulation-based inference, but bounds nothing: it depends on the sizes of the samples, and takes small differences
    that are seen everywhere for large ones. For a distance in units of the data take :func:`emd`.

    Args:
        x: One sample, ``(n, d)`` or ``(n,)``.
        y: The other sample, ``(m, d)`` or ``(m,)``. Samples of unequal size are cut to the smaller one.
        folds: The number of parts.
        width: The width of the two hidden layers; ten times d if None.
        seed: The seed of the parts and of the network.

    Returns:
        The accuracy, with its standard error over the points (those of one part share a network, so it is a little too small).

    Raises:
        TooFewDrawsError: If a sample has fewer points than ``folds``.
        ShapeError, EmptyDataError, NonFiniteError: If the samples don't fit together.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(300, 1, generator=g), torch.randn(300, 1, generator=g) + 4
        >>> float(c2st(x, y)) > 0.95
        True

    Reference:
        Lopez-Paz and Oquab, "Revisiting classifier two-sample tests", 2017; network and folds as in Lueckmann et al.,
        "Benchmarking simulation-based inference", 2021.
    """
    from sklearn.exceptions import ConvergenceWarning as Unfinished
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neural_network import MLPClassifier

    check_positive_int(folds, "folds", 2)
    start = as_seed(seed)
    a, b = _samples(x, y)
    for name, sample in (("x", a), ("y", b)):
        check_nonempty(sample, name)
        if len(sample) < folds:
            raise TooFewDrawsError(f"{name} is too small", got=len(sample), expected=f"at least {folds}")
    check_event_size(b, a.shape[-1], "y")
    size = min(len(a), len(b))
    order = torch.Generator().manual_seed(start)
    a, b = (v[torch.randperm(len(v), generator=order)[:size]] for v in (a.cpu(), b.cpu()))
    # the units of the first sample, so that the answer doesn't depend on those of the data
    center, scale = a.mean(0), a.std(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    points = ((torch.cat([a, b]) - center) / scale).numpy()
    label = torch.cat([torch.zeros(size), torch.ones(size)]).numpy()
    if width is not None:
        check_positive_int(width, "width")
    hidden = 10 * a.shape[-1] if width is None else width
    network = MLPClassifier((hidden, hidden), max_iter=300, random_state=start % 2**32)
    parts = StratifiedKFold(folds, shuffle=True, random_state=start % 2**32)
    with warnings.catch_warnings():
        # a classifier that could still learn is one that finds a little less
        warnings.simplefilter("ignore", Unfinished)
        right = torch.from_numpy(cross_val_predict(network, points, label, cv=parts) == label).double()
    return Estimate.of(right)
