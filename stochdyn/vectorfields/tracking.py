"""Zeros of vector fields followed through time: where they go, where pairs are born, and where they vanish."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import as_time_grid, check_event_size, check_ndim, check_real, check_type
from stochdyn.errors import ShapeError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.connection import connect
from stochdyn.vectorfields.regression._input import as_vectors
from stochdyn.vectorfields.singularities import as_triangles, places_of, require_surface, triangulate, turns

__all__ = ["Track", "Tracks", "track_singularities"]

End = Literal["time", "pair", "border"]
#: The number of a face that isn't there: beyond the border.
_OUTSIDE = -1


@dataclass(frozen=True)
class Track:
    """The way of one zero.

    Attributes:
        index: Its index, 1 for a vortex, a source or a sink, -1 for a saddle.
        ts: The times ``(k,)`` of its samples: those of its birth and death, and of the stamps between.
        places: Where it was then, ``(k, D)``.
        birth: How it began: ``"time"`` at the first stamp, ``"pair"`` together with a zero of the other index, or ``"border"``.
        death: How it ended: ``"time"`` at the last stamp, ``"pair"`` or ``"border"``.
    """

    index: int
    ts: Tensor
    places: Tensor
    birth: End
    death: End

    @property
    def duration(self) -> float:
        """The time between birth and death."""
        return float(self.ts[-1] - self.ts[0])

    @property
    def length(self) -> float:
        """The length of the way, along straight lines between the samples."""
        return float((self.places[1:] - self.places[:-1]).norm(dim=-1).sum())


@dataclass(frozen=True)
class Tracks:
    """All zeros of fields at successive times, as tracks.

    Attributes:
        ts: The times ``(T,)`` of the fields.
        faces: The triangles ``(F, 3)``.
        tracks: The tracks, in the order of their births.
    """

    ts: Tensor
    faces: Tensor
    tracks: list[Track]

    def __len__(self) -> int:
        return len(self.tracks)

    def lasting(self, at_least: float) -> list[Track]:
        """Return the tracks that lasted; in noisy fields most pairs vanish at once.

        Args:
            at_least: The shortest duration that counts, in the unit of ``ts``.
        """
        check_real(at_least, "at_least", minimum=0.0)
        return [track for track in self.tracks if track.duration >= at_least]

    def counts(self) -> tuple[Tensor, Tensor]:
        """Return the numbers of zeros of positive and of negative index at every time, two tensors ``(T,)``."""
        found = [torch.zeros(len(self.ts), dtype=torch.int64) for _ in range(2)]
        for track in self.tracks:
            within = (self.ts >= track.ts[0]) & (self.ts <= track.ts[-1])
            found[track.index < 0][within] += 1
        return found[0], found[1]


def track_singularities(cloud: PointCloud, vectors: Any, ts: Any = None, faces: Any = None) -> Tracks:
    r"""Follow the zeros of fields that were given, or estimated, at successive times.

    Between two stamps the field is taken as linear in time at every node, and its index in a triangle as what the angles
    along its edges say. Then the index can change only where the angle along an edge,

    .. math:: \theta_{ab}(t)=\arg\big(v_b(t)\,\overline{O_{ba}v_a(t)}\big),

    passes π, that is where the field vanishes on this edge: the imaginary part of a quadratic in t. There one of the two
    triangles loses one unit of index and the other gains it. So a zero goes from one triangle to the next, a pair is born, a pair
    vanishes, or a zero crosses the border; the sum of the indices never changes otherwise, and there is nothing to tune.

    Args:
        cloud: The points on an orientable surface.
        vectors: The fields ``(T, n, D)`` at all nodes: those of :meth:`RVGP.predict_mean`, or a draw of :meth:`RVGP.sample`.
        ts: The increasing times ``(T,)`` of the fields; 0, 1, 2 ... if None.
        faces: The triangles ``(F, 3)`` of nodes; by default those of :func:`triangulate`.

    Returns:
        The tracks.

    Raises:
        InvalidInputError: If the manifold isn't an orientable surface.
        ShapeError, TimeGridError, NonFiniteError: If the fields or times don't fit.

    Example:
        >>> from stochdyn.datasets import wind_on_sphere
        >>> points, _ = wind_on_sphere(300)
        >>> tilt = torch.linspace(0, 1, 20, dtype=torch.float64)
        >>> axis = torch.stack([tilt.sin(), 0 * tilt, tilt.cos()], -1)
        >>> spin = torch.linalg.cross(axis[:, None].expand(20, 300, 3), points.expand(20, 300, 3))
        >>> tracks = track_singularities(PointCloud(points, dim=2), spin, tilt)
        >>> sorted((t.index, t.birth, t.death) for t in tracks.lasting(1.0))  # the two poles of the rotation
        [(1, 'time', 'time'), (1, 'time', 'time')]

    Reference:
        Tricoche, Wischgoll, Scheuermann and Hagen, "Topology tracking for the visualization of time-dependent two-dimensional
        flows", 2002.
    """
    check_type(cloud, PointCloud, "cloud")
    require_surface(cloud)
    v = as_vectors(vectors, len(cloud), cloud.ambient_dim)
    check_ndim(v, 3, "vectors", "(number of times, number of nodes, ambient dimension)")
    clock = torch.arange(len(v), dtype=torch.float64) if ts is None else as_time_grid(ts).detach().double()
    check_event_size(clock, len(v), "ts", axis=0)
    if len(v) < 2:
        raise ShapeError("a track needs fields at two times or more", got=f"shape {tuple(v.shape)}")
    triangles = triangulate(cloud) if faces is None else as_triangles(faces, cloud)
    components = cloud.sites(slice(None)).to_tangent(v.detach().to(cloud.device, torch.float64))
    return _Tracker(cloud, components, clock, triangles).run()


@dataclass
class _Way:
    """A track while it is followed."""

    index: int
    birth: End
    ts: list[float] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    death: End = "time"

    def put(self, t: float, place: np.ndarray) -> None:
        # a crossing at a stamp itself is told once
        if self.ts and t <= self.ts[-1]:
            return
        self.ts.append(t)
        self.places.append(place)


class _Tracker:
    """The zeros of fields ``(T, n, 2)``, followed from crossing to crossing."""

    def __init__(self, cloud: PointCloud, components: Tensor, ts: Tensor, faces: np.ndarray) -> None:
        self.cloud, self.ts, self.faces = cloud, ts, faces
        self.components = components
        self.z = torch.complex(components[..., 0], components[..., 1]).cpu().numpy()
        self.array = cloud.array
        self._edges()
        self.ways: list[_Way] = []
        self.inside: dict[int, list[_Way]] = defaultdict(list)

    def _edges(self) -> None:
        """Every edge ``(a, b)`` once, its face that runs from a to b, and the one that runs from b to a."""
        sides = np.concatenate([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]])
        face = np.tile(np.arange(len(self.faces)), 3)
        forward = sides[:, 0] < sides[:, 1]
        edges, number = np.unique(np.sort(sides, axis=1), axis=0, return_inverse=True)
        number = number.reshape(-1)
        self.along = np.full(len(edges), _OUTSIDE)
        self.against = np.full(len(edges), _OUTSIDE)
        self.along[number[forward]] = face[forward]
        self.against[number[~forward]] = face[~forward]
        self.tails, self.heads = edges[:, 0], edges[:, 1]
        maps = connect(self.cloud.node_frames, self.heads, self.tails)
        self.turn = maps[:, 0, 0] + 1j * maps[:, 1, 0]

    def run(self) -> Tracks:
        corners = torch.as_tensor(self.faces, device=self.cloud.device)
        index = turns(self.cloud, self.components, self.faces).round()
        at = index.nonzero()
        found = places_of(self.cloud, self.components, corners, at).cpu().numpy()
        places = {(int(k), int(f)): place for (k, f), place in zip(at.tolist(), found, strict=True)}
        whole = index.cpu().numpy().astype(int)
        for f in np.flatnonzero(whole[0]):
            for _ in range(abs(whole[0, f])):
                self._begin(int(f), int(np.sign(whole[0, f])), "time")
        self._sample(0, places)
        for k in range(len(self.ts) - 1):
            for t, edge, gain in self._crossings(k):
                self._cross(t, edge, gain)
            self._settle(k + 1, whole[k + 1])
            self._sample(k + 1, places)
        tracks = [
            Track(
                way.index,
                torch.tensor(way.ts, dtype=torch.float64),
                torch.as_tensor(np.array(way.places)),
                way.birth,
                way.death,
            )
            for way in self.ways
        ]
        return Tracks(self.ts, corners, tracks)

    def _crossings(self, k: int) -> list[tuple[float, int, int]]:
        """Return time, edge and what the face along it gains, 1 or -1, of all crossings between two stamps, in order of time."""
        a, b = self.z[:, self.tails], self.z[:, self.heads]
        da, db = a[k + 1] - a[k], b[k + 1] - b[k]
        back = self.turn.conj()
        # w(s) = v_b conj(O v_a) = w0 + w1 s + w2 s² for s in [0, 1]; it crosses the negative axis where Im w = 0, Re w < 0
        w0 = b[k] * a[k].conj() * back
        w1 = (db * a[k].conj() + b[k] * da.conj()) * back
        w2 = db * da.conj() * back
        found = []
        for s in _roots(w2.imag, w1.imag, w0.imag):
            value = w0 + s * (w1 + s * w2)
            slope = w1.imag + 2 * s * w2.imag
            # upwards, the angle jumps from -π to π, and the face along the edge gains one
            for edge in np.flatnonzero((s >= 0) & (s < 1) & (value.real < 0) & (slope != 0)):
                found.append((float(s[edge]), int(edge), 1 if slope[edge] > 0 else -1))
        start, step = float(self.ts[k]), float(self.ts[k + 1] - self.ts[k])
        return [(start + s * step, edge, gain) for s, edge, gain in sorted(found)]

    def _place(self, t: float, edge: int) -> np.ndarray:
        """Return where on an edge a linear field vanishes, by the lengths of the vectors at its ends."""
        clock = self.ts.numpy()
        k = min(int(np.searchsorted(clock, t, side="right")) - 1, len(clock) - 2)
        s = (t - clock[k]) / (clock[k + 1] - clock[k])
        i, j = self.tails[edge], self.heads[edge]
        near, far = (abs((1 - s) * self.z[k, n] + s * self.z[k + 1, n]) for n in (i, j))
        share = near / max(near + far, 1e-300)
        return (1 - share) * self.array[i] + share * self.array[j]

    def _cross(self, t: float, edge: int, gain: int) -> None:
        """Move one unit of index over an edge: a zero goes over, or a pair is born or vanishes there."""
        one, other = int(self.along[edge]), int(self.against[edge])
        winner, loser = (one, other) if gain > 0 else (other, one)
        self._exchange(winner, loser, t, self._place(t, edge))

    def _exchange(self, winner: int, loser: int, t: float, place: np.ndarray) -> None:
        """Give one unit of index to a face at the cost of another: a way goes over, or two meet, or two begin."""
        source = next((w for w in self.inside[loser] if w.index > 0), None) if loser != _OUTSIDE else None
        hole = next((w for w in self.inside[winner] if w.index < 0), None) if winner != _OUTSIDE else None
        if source is not None and hole is not None:
            self._end(source, loser, "pair", t, place)
            self._end(hole, winner, "pair", t, place)
        elif source is not None:
            self._move(source, loser, winner, t, place)
        elif hole is not None:
            self._move(hole, winner, loser, t, place)
        else:
            how: End = "border" if _OUTSIDE in (winner, loser) else "pair"
            for face, index in ((winner, 1), (loser, -1)):
                if face != _OUTSIDE:
                    self._begin(face, index, how).put(t, place)

    def _begin(self, face: int, index: int, how: End) -> _Way:
        way = _Way(index, how)
        self.ways.append(way)
        self.inside[face].append(way)
        return way

    def _end(self, way: _Way, face: int, how: End, t: float, place: np.ndarray) -> None:
        self.inside[face].remove(way)
        way.put(t, place)
        way.death = how

    def _move(self, way: _Way, here: int, there: int, t: float, place: np.ndarray) -> None:
        if there == _OUTSIDE:
            self._end(way, here, "border", t, place)
            return
        self.inside[here].remove(way)
        self.inside[there].append(way)

    def _settle(self, k: int, index: np.ndarray) -> None:
        """Agree with the index at a stamp, where a crossing fell on the stamp itself and rounding saw it on one side only."""
        faces = {int(f) for f in np.flatnonzero(index)} | {f for f, ways in self.inside.items() if ways}
        gap = {f: int(index[f]) - sum(w.index for w in self.inside[f]) for f in faces}
        more, less = [f for f in gap if gap[f] > 0], [f for f in gap if gap[f] < 0]
        middle = self.array[self.faces].mean(1)
        t = float(self.ts[k])
        while more and less:
            # the nearest pair of faces of which one has a unit too many and the other one too few
            far = np.linalg.norm(middle[more][:, None] - middle[less][None], axis=-1)
            i, j = np.unravel_index(int(far.argmin()), far.shape)
            winner, loser = more[i], less[j]
            self._exchange(winner, loser, t, 0.5 * (middle[winner] + middle[loser]))
            gap[winner] -= 1
            gap[loser] += 1
            more, less = [f for f in gap if gap[f] > 0], [f for f in gap if gap[f] < 0]
        for face in [*more, *less]:  # over the border, on the stamp
            for _ in range(abs(gap[face])):
                way = next((w for w in self.inside[face] if w.index * gap[face] < 0), None)
                if way is None:
                    self._begin(face, 1 if gap[face] > 0 else -1, "border").put(t, middle[face])
                else:
                    self._end(way, face, "border", t, middle[face])

    def _sample(self, k: int, places: dict[tuple[int, int], np.ndarray]) -> None:
        """Note where the zeros are at a stamp."""
        t = float(self.ts[k])
        middle = self.array[self.faces].mean(1)
        for face, ways in self.inside.items():
            for way in ways:
                way.put(t, places.get((k, face), middle[face]))


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two roots of a s² + b s + c, NaN where there are none, without cancellation."""
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(b * b - 4 * a * c)
        # the larger one by addition of like signs, the other by their product c / a
        q = -0.5 * (b + np.where(b >= 0, root, -root))
        return q / a, c / q
