"""Families of populations before and after: letters, Gaussians with exact answers, and a synthetic drug screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_event_size,
    check_nonempty,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.errors import InvalidInputError

__all__ = ["DrugScreen", "GaussianDenoising", "LetterClouds", "MeanFieldOU", "drug_screen", "letters"]

_F64 = torch.zeros(0, dtype=torch.float64)


class LetterClouds(NamedTuple):
    """Point clouds of letters, noised and clean, row by row.

    Attributes:
        starts: Noised clouds ``(n_i, 2)``, one per letter and rotation.
        targets: The clean clouds; row k of a start is row k of its target with noise.
        names: The letter of each cloud.
    """

    starts: list[Tensor]
    targets: list[Tensor]
    names: list[str]


def letters(
    names: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    count: int = 10,
    obs_scale: float = 0.5,
    size: int | None = None,
    generator: torch.Generator | int | None = 0,
) -> LetterClouds:
    """Draw letters as populations: every pixel of a glyph is a point, and noise on the points is what is to be removed.

    Which way a point has to move depends on the letter and on how it is turned, hence on all other points. Glyphs are those of
    the font DejaVu Sans, which comes with matplotlib, on [-3, 3] in the longer direction.

    Args:
        names: The letters.
        count: The number of clouds per letter, each turned by an angle that is uniform on the circle.
        obs_scale: The standard deviation of the noise.
        size: The number of points of a cloud, drawn without replacement; all of them (800 to 2800) if None.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        InvalidInputError: If a name has no glyph, or a size isn't positive.

    Example:
        >>> clouds = letters("LT", count=2, size=100)
        >>> clouds.names, clouds.starts[0].shape
        (['L', 'L', 'T', 'T'], torch.Size([100, 2]))

    Reference:
        Atanackovic et al., "Meta flow matching", 2024, section 5.1, who use another font.
    """
    check_type(names, str, "names")
    check_nonempty(names, "names")
    check_positive_int(count, "count")
    check_real(obs_scale, "obs_scale", minimum=0.0)
    if size is not None:
        check_positive_int(size, "size")
    source = as_generator(generator)
    starts, targets, owners = [], [], []
    for name in names:
        glyph = _glyph(name)
        for _ in range(count):
            angle = 2 * math.pi * float(torch.rand((), generator=source))
            turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            rows = torch.randperm(len(glyph), generator=source)[:size]
            # a pixel is blurred by a fortieth of a stroke, so that clouds aren't lattices
            x = (glyph[rows] + 0.05 * torch.randn(len(rows), 2, generator=source)) @ turn.mT
            starts.append(x + obs_scale * torch.randn(x.shape, generator=source))
            targets.append(x)
            owners.append(name)
    return LetterClouds(starts, targets, owners)


def _glyph(name: str) -> Tensor:
    """Return the pixels of a letter, its longer side on [-3, 3]."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 100)
    canvas = Image.new("L", (200, 200))
    ImageDraw.Draw(canvas).text((50, 40), name, fill=255, font=font)
    pixels = torch.tensor(bytearray(canvas.tobytes()), dtype=torch.uint8).reshape(200, 200)
    row, column = pixels.nonzero().float().unbind(-1)
    if not len(row):
        raise InvalidInputError("a name has no glyph", got=repr(name), expected="letters or digits")
    x = torch.stack([column, -row], -1)
    low, high = x.amin(0), x.amax(0)
    return (x - 0.5 * (low + high)) * (6.0 / float((high - low).max()))


def _points(x: object, dim: int) -> Tensor:
    points = as_tensor(x, "x", like=_F64)
    check_event_size(points, dim, "x")
    return points


class GaussianDenoising:
    r"""Gaussian populations with noise, to be carried to those without; everything about the straight path is exact.

    .. math:: x_1\sim N(m,S),\qquad x_0=x_1+\sigma z,\qquad v(t,x)=-(1-t)\sigma^2\big(S+(1-t)^2\sigma^2\big)^{-1}(x-m)

    Args:
        mean: The mean m of the population, ``(d,)``.
        cov: The covariance S, ``(d, d)``.
        obs_scale: The standard deviation :math:`\sigma` of the noise.

    Raises:
        InvalidInputError: If the scale isn't positive.

    Example:
        >>> law = GaussianDenoising([1.0, -0.5], [[0.6, 0.2], [0.2, 0.3]])
        >>> law.velocity(0.0, torch.zeros(2, dtype=torch.float64))
        tensor([ 0.3801, -0.3655], dtype=torch.float64)
    """

    def __init__(
        self, mean: Tensor | Sequence[float], cov: Tensor | Sequence[Sequence[float]], obs_scale: float = 0.5
    ) -> None:
        self.mean = as_tensor(mean, "mean", 1, "(d,)", like=_F64).double()
        self.cov = as_tensor(cov, "cov", 2, "(d, d)", like=_F64).double()
        check_real(obs_scale, "obs_scale", above=0.0)
        self.obs_scale = float(obs_scale)

    def velocity(self, t: float, x: Tensor) -> Tensor:
        """Return the velocity of the straight path between paired points, ``(..., d)``."""
        x = _points(x, len(self.mean))
        left = (1 - as_tensor(t, "t", like=x)) * self.obs_scale
        spread = self.cov + left**2 * torch.eye(len(self.mean), dtype=torch.float64)
        away = (x - self.mean).unsqueeze(-1)
        return -left * self.obs_scale * torch.linalg.solve(spread, away).squeeze(-1)

    def flow(self, x: Tensor) -> Tensor:
        r"""Return where the flow carries points: :math:`m+S^{1/2}(S+\sigma^2)^{-1/2}(x_0-m)`, which is the optimal map too."""
        x = _points(x, len(self.mean))
        values, vectors = torch.linalg.eigh(self.cov)
        ratio = (values.clamp(min=0) / (values + self.obs_scale**2)).sqrt()
        return self.mean + (x - self.mean) @ (vectors @ torch.diag(ratio) @ vectors.mT)

    def floor(self) -> float:
        r"""Return the loss of the exact field, :math:`\int_0^1\tfrac12\sigma^2\,\mathrm{tr}\,S(S+(1-t)^2\sigma^2)^{-1}dt`."""
        values = torch.linalg.eigvalsh(self.cov)
        root = values.clamp(min=0).sqrt()
        # the integral of s / (s + u^2 sigma^2) over u in [0, 1] is r arctan(sigma / r) / sigma with r the root of s
        return float(
            0.5 * self.obs_scale * (root * torch.atan2(values.new_tensor(self.obs_scale), root)).sum()
        )

    def sample(self, n: int, generator: torch.Generator | int | None = None) -> tuple[Tensor, Tensor]:
        """Draw paired points: noised ``(n, d)`` and clean ``(n, d)``, in torch's default precision."""
        check_positive_int(n, "n")
        source, d = as_generator(generator), len(self.mean)
        root = torch.linalg.cholesky(self.cov)
        clean = self.mean + torch.randn(n, d, dtype=torch.float64, generator=source) @ root.mT
        noised = clean + self.obs_scale * torch.randn(n, d, dtype=torch.float64, generator=source)
        dtype = torch.get_default_dtype()
        return noised.to(dtype), clean.to(dtype)


class MeanFieldOU:
    r"""A Gaussian population whose points are pulled to their mean while the mean turns about the origin, in the plane.

    .. math:: dX=\big(-a(X-\mu)+c\,J\mu\big)dt+\sqrt{2D}\,dW,\qquad\mu=E\,X,\quad J=\begin{pmatrix}0&-1\\1&0\end{pmatrix}

    No field that is blind to the population can turn it by its mean.

    Args:
        mean0: The mean at time 0, ``(2,)``.
        cov0: The covariance at time 0, ``(2, 2)``.
        rate: The rate a of the pull, in 1/time.
        frequency: The angular velocity c of the mean, in 1/time.
        diffusion: The strength of the noise, :math:`\sqrt{2D}`, in units of the state per root of time.

    Raises:
        InvalidInputError: If the rate isn't positive, or the diffusion negative.

    Example:
        >>> law = MeanFieldOU([1.0, 0.5], [[0.5, 0.1], [0.1, 0.2]])
        >>> law.moments(1.0)[0]
        tensor([0.3380, 1.0657], dtype=torch.float64)
    """

    def __init__(
        self,
        mean0: Tensor | Sequence[float],
        cov0: Tensor | Sequence[Sequence[float]],
        rate: float = 1.0,
        frequency: float = 0.8,
        diffusion: float = 0.2**0.5,
    ) -> None:
        self.mean0 = as_tensor(mean0, "mean0", 1, "(2,)", like=_F64).double()
        self.cov0 = as_tensor(cov0, "cov0", 2, "(2, 2)", like=_F64).double()
        check_real(rate, "rate", above=0.0)
        check_real(frequency, "frequency")
        check_real(diffusion, "diffusion", minimum=0.0)
        self.rate, self.frequency, self.diffusion = float(rate), float(frequency), float(diffusion)

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        r"""Return mean and covariance: :math:`e^{ctJ}m_0` and :math:`e^{-2at}S_0+\tfrac Da(1-e^{-2at})`."""
        check_real(t, "t")
        angle, decay = self.frequency * t, math.exp(-2 * self.rate * t)
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        final = 0.5 * self.diffusion**2 / self.rate
        identity = torch.eye(2, dtype=torch.float64)
        return turn @ self.mean0, decay * self.cov0 + final * (1 - decay) * identity

    def velocity(self, t: float, x: Tensor) -> Tensor:
        r"""Return the velocity of the probability flow, :math:`-a(x-m)+cJm+D\,S^{-1}(x-m)`, at ``(..., 2)``."""
        x = _points(x, 2)
        mean, cov = self.moments(t)
        turned = torch.stack([-mean[1], mean[0]])
        away = (x - mean).unsqueeze(-1)
        lift = 0.5 * self.diffusion**2 * torch.linalg.solve(cov, away).squeeze(-1)
        return -self.rate * (x - mean) + self.frequency * turned + lift

    def path_velocity(self, t: float, x: Tensor, coupling: str = "ot") -> Tensor:
        r"""Return the velocity of the straight path from time 0 to time 1, at ``(..., 2)``.

        It has the same two ends as the process, and is another field: a regression learns the one of its coupling.

        .. math:: \dot m+\dot B_tB_t^{-1}(x-m_t)\ \text{(ot)},\qquad \dot m+\tfrac12\dot C_tC_t^{-1}(x-m_t)\ \text{(independent)}

        with :math:`B_t=(1-t)+tA`, A the optimal map, and :math:`C_t=(1-t)^2S_0+t^2S_1`.

        Args:
            t: The time on the path.
            x: The points.
            coupling: ``"ot"`` or ``"independent"``.
        """
        check_real(t, "t")
        x = _points(x, 2)
        (m0, s0), (m1, s1) = self.moments(0.0), self.moments(1.0)
        away = (x - torch.lerp(m0, m1, t)).unsqueeze(-1)
        if coupling == "ot":
            root = _matrix_power(s0, 0.5)
            inverse = _matrix_power(s0, -0.5)
            ot_map = inverse @ _matrix_power(root @ s1 @ root, 0.5) @ inverse
            identity = torch.eye(2, dtype=torch.float64)
            slope = (ot_map - identity) @ torch.linalg.inv(torch.lerp(identity, ot_map, t))
        elif coupling == "independent":
            spread = (1 - t) ** 2 * s0 + t**2 * s1
            slope = (t * s1 - (1 - t) * s0) @ torch.linalg.inv(spread)
        else:
            raise InvalidInputError("coupling is unknown", got=coupling, expected="'ot' | 'independent'")
        return m1 - m0 + (slope @ away).squeeze(-1)

    def sample(self, t: float, n: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw ``(n, 2)`` points at a time, in torch's default precision."""
        check_positive_int(n, "n")
        mean, cov = self.moments(t)
        z = torch.randn(n, 2, dtype=torch.float64, generator=as_generator(generator))
        return (mean + z @ torch.linalg.cholesky(cov).mT).to(torch.get_default_dtype())


def _matrix_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.mT


class DrugScreen(NamedTuple):
    """Cells of patients before and after treatments.

    Attributes:
        starts: Cells without treatment ``(n_i, d)``, other ones than those of the targets, one sample per patient and treatment.
        targets: Cells after the treatment ``(m_i, d)``.
        treatments: ``(M, k)``: which of the treatments, as zeros and a one.
        subject: ``(M,)``: which patient.
    """

    starts: list[Tensor]
    targets: list[Tensor]
    treatments: Tensor
    subject: Tensor


def drug_screen(
    count: int = 40,
    treatments: int = 3,
    num_cells: int = 300,
    dim: int = 4,
    generator: torch.Generator | int | None = 0,
) -> DrugScreen:
    r"""Simulate patients whose response to a treatment depends on their whole population of cells.

    A patient's cells are Gaussian, with a mean and covariance of their own. Treatment j turns the mean in a plane by an angle that is
    its own and contracts the population about its mean,

    .. math:: x\mapsto R_jm+e^{-a_j}R_j(x-m)+\tfrac1{10}\xi,

    so that two patients' cells at one place go to different places. Numbers of cells vary between half of ``num_cells`` and all of them.

    Args:
        count: The number of patients.
        treatments: The number of treatments; every patient gets each of them.
        num_cells: The largest number of cells of a sample.
        dim: The number of markers, at least 2.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        InvalidInputError: If a number isn't a positive integer, or ``dim`` is below 2.

    Example:
        >>> screen = drug_screen(count=5, treatments=2)
        >>> len(screen.starts), screen.treatments.shape
        (10, torch.Size([10, 2]))
    """
    for name, value in (("count", count), ("treatments", treatments), ("num_cells", num_cells)):
        check_positive_int(value, name)
    check_positive_int(dim, "dim", 2)
    source = as_generator(generator)
    angles = math.pi * (torch.rand(treatments, generator=source) - 0.5)
    pulls = torch.rand(treatments, generator=source)
    planes = [torch.linalg.qr(torch.randn(dim, dim, generator=source))[0] for _ in range(treatments)]
    starts, targets, given, subject = [], [], [], []
    for patient in range(count):
        mean = 1.5 * torch.randn(dim, generator=source)
        root = 0.4 * torch.randn(dim, dim, generator=source) / dim**0.5 + 0.3 * torch.eye(dim)

        def cells(mean: Tensor = mean, root: Tensor = root) -> Tensor:
            share = 0.5 + 0.5 * float(torch.rand((), generator=source))
            n = max(2, round(share * num_cells))
            return mean + torch.randn(n, dim, generator=source) @ root.mT

        for j in range(treatments):
            turn = torch.eye(dim)
            c, s = float(angles[j].cos()), float(angles[j].sin())
            turn[:2, :2] = torch.tensor([[c, -s], [s, c]])
            turn = planes[j] @ turn @ planes[j].mT
            x = cells()
            after = mean @ turn.mT + math.exp(-float(pulls[j])) * (x - mean) @ turn.mT
            targets.append(after + 0.1 * torch.randn(x.shape, generator=source))
            starts.append(cells())
            given.append(torch.eye(treatments)[j])
            subject.append(patient)
    return DrugScreen(starts, targets, torch.stack(given), torch.tensor(subject))
