"""A point cloud with the geometry of the manifold that it samples: frames, connection, Laplacians, spectra."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_ndim, check_positive
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.geometry import connection, extension, laplacian, mesh, spectrum
from stochdyn.vectorfields.geometry.frames import estimate_dimension, local_frames
from stochdyn.vectorfields.geometry.graph import BANDWIDTH, NeighborGraph, NeighborSearch, neighbor_graph
from stochdyn.vectorfields.regression._input import as_count, as_index, as_points, is_index
from stochdyn.vectorfields.regression.rows import rows_of
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["PointCloud"]

_KINDS = ("connection", "scalar")


class PointCloud:
    r"""Points on an unknown manifold, and what can be learnt about it from them.

    A graph of nearest neighbours, a tangent frame :math:`T_i` at every point by local principal components, and
    between neighbours the orthogonal map :math:`O_{ij}=\operatorname{polar}(T_i^\top T_j)`, which is parallel transport to
    second order. From these follow the Laplacians of functions and of vector fields, in units of 1 / length².

    Args:
        points: The points ``(n, D)`` in ambient coordinates, in any unit of length; a tensor, an array or a list.
        num_neighbors: The number of neighbours of every point in the graph. Ten suit even samples of thin or curved shapes;
            on uneven, random samples twenty to forty give better eigenvalues.
        dim: The dimension m of the manifold; it is estimated if None, with a warning where that is uncertain.
        graph: Which points are joined: ``"knn"`` (each with its nearest neighbours), for most clouds, or ``"cknn"``
            (continuous k nearest neighbours), where the density of the points varies by orders of magnitude.
        weights: The weights of the edges: ``"gaussian"`` with the width of each neighbourhood, or ``"connectivity"``, all
            1, as in the published experiments.
        normalization: How the masses of the Laplacians are chosen, see
            :func:`~stochdyn.vectorfields.geometry.laplacian.masses`: ``"local"`` for absolute units everywhere,
            ``"degree"`` for the random-walk Laplacian, ``"none"`` for the unnormalised one.
        density_correction: The power of the density of points by which Gaussian weights are divided; 1 makes the limit
            independent of how the points are spread, 0 weighs it in.
        bandwidth: The width of Gaussian weights, relative to the squared distances to the last neighbours.
        frame_neighbors: The number of neighbours that make a frame; 1.5 times ``num_neighbors`` if None.
        frames: Known orthonormal tangent frames ``(n, D, m)``, in place of estimated ones.
        search: How neighbours are found: ``"exact"`` (scikit-learn) or ``"approximate"`` (pynndescent, for hundreds of
            thousands of points).
        allow_disconnected: Whether a graph in several pieces is accepted.

    Attributes:
        points: The points ``(n, D)``.
        dim: The dimension m of the manifold.
        frames: The tangent frames ``(n, D, m)``, of one handedness where the manifold is orientable.
        edges: The pairs of neighbours ``(i, j)`` with ``i < j``, ``(E, 2)``.
        connections: The maps :math:`O_{ij}` from the tangent space at ``j`` to that at ``i``, ``(E, m, m)``.
        is_orientable, is_connected: Whether the graph has frames of one handedness, and whether it is in one piece.
        array, node_frames, mass: The points, frames and masses in double precision for numpy.

    Raises:
        DisconnectedGraphError: If the graph falls apart; the components are named.
        InvalidInputError: If points coincide, if there are fewer points than neighbours, or if the dimension exceeds the
            ambient one.
        NonFiniteError, ShapeError: If the points aren't ``(n, D)`` finite numbers.

    Example:
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> [round(float(value), 1) for value in circle.spectrum(5)[0]]  # exactly 0, 1, 1, 4, 4
        [0.0, 1.0, 1.0, 4.0, 4.0]

    Reference:
        Peach, Vinao-Carl, Grossman, David, Mallas, Sharp, Malhotra, Vandergheynst and Gosztolai, "Implicit Gaussian
        process representation of vector fields over arbitrary latent manifolds", 2024, section 3; Singer and Wu,
        "Vector diffusion maps and the connection Laplacian", 2012.
    """

    _derived_ = ("_spectra",)

    #: Whether this is a cloud as :meth:`functions` returns it.
    of_functions: bool = False

    def __init__(
        self,
        points: Any,
        num_neighbors: int = 10,
        dim: int | None = None,
        *,
        graph: str = "knn",
        weights: str = "gaussian",
        normalization: str = "local",
        density_correction: float = 1.0,
        bandwidth: float = BANDWIDTH,
        frame_neighbors: int | None = None,
        frames: Any = None,
        search: str = "exact",
        allow_disconnected: bool = False,
    ) -> None:
        tensor = as_points(points)
        array = tensor.detach().cpu().double().numpy()
        n, ambient = array.shape
        count = as_count(num_neighbors, "num_neighbors")
        wide = max(
            count, as_count(frame_neighbors, "frame_neighbors") if frame_neighbors else int(1.5 * count)
        )
        check_choice(normalization, laplacian.NORMALIZATIONS, "normalization")
        check_positive(float(bandwidth), "bandwidth")
        if n <= count:
            raise InvalidInputError(
                "there must be more points than neighbours", got=f"{n} points, num_neighbors={count}"
            )
        given = None if frames is None else _check_frames(frames, n, ambient)
        if given is not None:
            dim = given.shape[2] if dim is None else dim
        if dim is not None:
            dim = _check_dim(dim, ambient, None if given is None else given.shape[2])
        wide = min(wide, n - 1)
        self.search = NeighborSearch(array, search)
        distances, nodes = _others(
            self.search, array, max(wide, min(3 * count, n - 1)) if dim is None else wide
        )
        self._graph = neighbor_graph(
            array,
            distances[:, :count],
            nodes[:, :count],
            kind=graph,
            weighting=weights,
            bandwidth=float(bandwidth),
            density_correction=float(density_correction),
        )
        if not allow_disconnected:
            self._graph.require_connected()
        if dim is None:
            dim = estimate_dimension(array, distances, nodes)
        if given is None:
            given = local_frames(array, array, distances[:, :wide], nodes[:, :wide], dim)
        self.num_neighbors, self.frame_neighbors, self.normalization = count, wide, normalization
        self._finish(tensor, array, given, laplacian.masses(self._graph, dim, normalization), None)

    def _finish(
        self, tensor: Tensor, array: np.ndarray, given: np.ndarray, mass: np.ndarray, faces: np.ndarray | None
    ) -> None:
        """Connect the frames, orient them, and keep everything as tensors where the points live."""
        g = self._graph
        maps = connection.connect(given, g.tails, g.heads)
        products = np.einsum("eda,edb->eab", given[g.tails], given[g.heads])
        overlap = np.linalg.svd(products, compute_uv=False)[:, -1]
        signs, self.is_orientable = connection.orient(g.num_nodes, g.tails, g.heads, maps, overlap)
        if self.is_orientable:
            flip = signs < 0
            given = given.copy()
            given[flip, :, -1] *= -1.0
            maps = maps.copy()
            maps[flip[g.tails], -1, :] *= -1.0
            maps[flip[g.heads], :, -1] *= -1.0
        self.array, self.node_frames, self._maps, self.mass = array, given, maps, mass
        self.device, self.dtype = tensor.device, tensor.dtype
        self.dim = int(given.shape[2])
        self.points = tensor.detach()
        self.frames = self._tensor(given).to(tensor.dtype)
        self.edges = torch.as_tensor(np.stack([g.tails, g.heads], 1), device=tensor.device)
        self.connections = self._tensor(maps).to(tensor.dtype)
        self.faces = None if faces is None else torch.as_tensor(faces, device=tensor.device)
        self._spectra: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_mesh(cls, vertices: Any, faces: Any, *, allow_disconnected: bool = False) -> PointCloud:
        """Build the geometry from a triangle mesh in space: cotangent weights, vertex normals and areas.

        A mesh knows which sheets of a surface belong together where they come close in space, and its zeros are found
        on its own triangles; a plain cloud needs none, works in any dimension, and copes better with slivers.

        Args:
            vertices: The vertices ``(n, 3)``, in any unit of length.
            faces: The corners ``(F, 3)`` of the triangles as numbers of vertices. Those that turn another way than most are turned
                round.
            allow_disconnected: Whether the mesh may consist of several surfaces that have no edge in common.

        Raises:
            DisconnectedGraphError: If it does and may not.
            ShapeError, InvalidInputError: If the faces aren't triangles of existing vertices, come twice, or have no area; or if
                vertices coincide.
        """
        tensor = as_points(vertices, "vertices", 3)
        array = tensor.detach().cpu().double().numpy()
        faces = mesh.check_faces(faces.cpu().numpy() if isinstance(faces, Tensor) else faces, len(array))
        faces, oriented = mesh.orient_faces(faces)
        cloud = cls.__new__(cls)
        cloud._graph = mesh.mesh_graph(array, faces)
        mesh.check_vertices(array)
        check_bool(allow_disconnected, "allow_disconnected")
        if not allow_disconnected:
            cloud._graph.require_connected()
        cloud.search = NeighborSearch(array, "exact")
        cloud.num_neighbors, cloud.frame_neighbors, cloud.normalization = (
            6,
            min(15, len(array) - 1),
            "none",
        )
        cloud._finish(
            tensor, array, mesh.vertex_frames(array, faces, oriented), mesh.vertex_areas(array, faces), faces
        )
        return cloud

    def __len__(self) -> int:
        return self._graph.num_nodes

    def __deepcopy__(self, memo: dict[int, Any]) -> PointCloud:
        # it never changes, and kernels, which gpytorch copies, hold it
        return self

    def __repr__(self) -> str:
        if self.of_functions:
            return f"functions on {len(self)} points in {self.ambient_dim} dimensions"
        kind = "orientable" if self.is_orientable else "not orientable"
        return (
            f"PointCloud({len(self)} points of dimension {self.dim} in {self.ambient_dim}, "
            f"{len(self._graph.tails)} edges, {kind})"
        )

    @property
    def ambient_dim(self) -> int:
        """D, the number of coordinates of a point."""
        return self.array.shape[1]

    @property
    def value_dim(self) -> int:
        """The number of coordinates of a value: D for vector fields, and 1 for functions."""
        return self.node_frames.shape[1]

    def functions(self) -> PointCloud:
        """Return the same points with one number per point in place of a tangent vector.

        Functions are the sections of the trivial line bundle, whose connection is one and whose connection Laplacian is the
        graph Laplacian. So all kernels and backends of vector fields serve functions too; see
        :class:`~stochdyn.vectorfields.ScalarGP`.
        """
        bundle = copy.copy(self)
        for name in ("two_rings", "typical_doubt", "left_out"):
            bundle.__dict__.pop(name, None)
        one, edge = np.ones((len(self), 1, 1)), np.ones((len(self._graph.tails), 1, 1))
        bundle.node_frames, bundle._maps = one, edge
        bundle.frames, bundle.connections = (self._tensor(a).to(self.dtype) for a in (one, edge))
        bundle.dim, bundle.is_orientable, bundle.of_functions = 1, True, True
        bundle._spectra = {}
        return bundle

    @property
    def is_connected(self) -> bool:
        """Whether the graph is in one piece."""
        return int(self._graph.components().max()) == 0

    @property
    def graph(self) -> NeighborGraph:
        """The graph of neighbours."""
        return self._graph

    @property
    def spacing(self) -> float:
        """Median distance between neighbours, in the unit of the points."""
        return float(np.median(self._graph.lengths))

    @functools.cached_property
    def two_rings(self) -> list[np.ndarray]:
        """For every node the nodes within two edges, itself first."""
        return self._graph.rings(2)

    @functools.cached_property
    def typical_doubt(self) -> float:
        """The share of a field's variance that reading it between the nodes leaves open at most."""
        return extension.typical_doubt(self)

    def pencil(self, kind: str = "connection", *, real: bool = False) -> laplacian.Pencil:
        """Return the sparse Laplacian and its masses.

        Args:
            kind: The bundle: ``"connection"`` for vector fields, ``"scalar"`` for functions.
            real: Whether the connection Laplacian is written in real components also where it has the shorter complex form.
        """
        check_choice(kind, _KINDS, "kind")
        maps = self._maps if kind == "connection" else None
        paired = maps is not None and self.dim == 2 and self.is_orientable and not real
        return laplacian.assemble(self._graph, self.mass, maps, paired)

    def spectrum(self, k: int, kind: str = "connection") -> tuple[Tensor, Tensor]:
        r"""Return the k smallest eigenvalues of a Laplacian and its modes.

        On an oriented surface eigenvalues of vector fields come in pairs, which are never split: an odd k is
        rounded up there. Results are kept, and a smaller k is read from them.

        Args:
            k: The number k of eigenpairs.
            kind: The Laplacian: ``"connection"`` for vector fields, ``"scalar"`` for functions.

        Returns:
            Eigenvalues ``(k,)`` in 1 / length², and modes ``(n, m, k)`` in the frames of the points, or ``(n, k)``
            for functions; each of mean square one per component.

        Raises:
            InvalidInputError: If there are fewer than k eigenpairs, or if the kind is unknown.
        """
        values, modes = self.modes(k, kind)
        values, modes = values.to(self.dtype), modes.to(self.dtype)
        return values, modes if kind == "connection" else modes[:, 0]

    def modes(self, k: int, kind: str = "connection") -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``(k,)`` and modes ``(n, f, k)`` in double precision; see :meth:`spectrum`."""
        check_choice(kind, _KINDS, "kind")
        k = as_count(k, "k")
        if kind == "connection" and self.dim == 2 and self.is_orientable:
            k += k % 2
        known = self._spectra.get(kind)
        if known is None or known[0].shape[0] < k:
            values, modes = spectrum.smallest_eigenpairs(self.pencil(kind), k)
            known = self._spectra[kind] = (self._tensor(values), self._tensor(modes))
        return known[0][:k], known[1][..., :k]

    def sites(self, where: Any) -> Sites:
        """Return places given as nodes or as points, with frames and their ties to the nodes.

        Args:
            where: The nodes (whole numbers, a mask, a slice) or the points ``(q, D)``, on the manifold or near it.

        Raises:
            InvalidInputError: If an index lies outside the cloud.
            ShapeError, NonFiniteError: If the points don't fit the cloud.
        """
        if isinstance(where, Sites):
            return where
        if is_index(where):
            return self._node_sites(as_index(where, len(self)))
        return self._point_sites(as_points(where, "points", self.ambient_dim))

    def rows(self, where: Any) -> Tensor:
        """Return the inputs of gpytorch kernels for all components at nodes or points, ``(q m, 1 + 2 D)``; see :mod:`~.rows`."""
        return rows_of(self.sites(where))

    def _node_sites(self, index: Tensor) -> Sites:
        index = index.to(self.device)
        one = torch.ones(len(index), 1, dtype=torch.float64, device=self.device)
        points, frames = self._tensor(self.array)[index], self._tensor(self.node_frames)[index]
        none = torch.zeros_like(one[:, 0])
        return Sites(points, frames, index[:, None], one, None, none, none)

    def _point_sites(self, points: Tensor) -> Sites:
        array = points.detach().cpu().double().numpy()
        return self._tied(array, extension.tie(self, array))

    def _tied(self, array: np.ndarray, ties: extension.Ties) -> Sites:
        nodes = torch.as_tensor(ties.nodes, device=self.device)
        frames, weights, maps, beyond, doubt = (
            self._tensor(part) for part in (ties.frames, ties.weights, ties.maps, ties.open, ties.doubt)
        )
        return Sites(self._tensor(array), frames, nodes, weights, maps, beyond, doubt)

    @functools.cached_property
    def left_out(self) -> tuple[Sites, list[Sites]]:
        """Some nodes, and the same places as they are read from other nodes, near ones and farther ones, in the same frames."""
        chosen, levels = extension.left_out(self)
        return self._node_sites(torch.as_tensor(chosen)), [self._tied(self.array[chosen], t) for t in levels]

    def transport(self, vectors: Any, path: Sequence[int]) -> Tensor:
        """Carry an ambient vector ``(D,)`` at ``path[0]`` along neighbouring nodes to ``path[-1]``."""
        nodes = as_index(path, len(self), "path")
        moved = self._tensor(self.node_frames)[nodes[0]].T @ torch.as_tensor(vectors, dtype=torch.float64)
        for here, there in itertools.pairwise(nodes):
            step = connection.connect(self.node_frames, there[None].numpy(), here[None].numpy())[0]
            moved = self._tensor(step) @ moved
        return (self._tensor(self.node_frames)[nodes[-1]] @ moved).to(self.dtype)

    def holonomy(self, loop: Sequence[int]) -> Tensor:
        """Return what a tangent vector undergoes along a closed loop of nodes, ``(m, m)``; see :func:`~.connection.holonomy`."""
        nodes = as_index(loop, len(self), "loop")
        return self._tensor(connection.holonomy(self.node_frames, nodes.tolist())).to(self.dtype)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), device=self.device)


def _others(search: NeighborSearch, points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and nodes of the nearest other points: the point itself is dropped wherever it stands."""
    distances, nodes = search.query(points, count + 1)
    itself = nodes == np.arange(len(points))[:, None]
    itself[~itself.any(1), -1] = True  # crowded out by coinciding points
    return distances[~itself].reshape(len(points), count), nodes[~itself].reshape(len(points), count)


def _check_dim(dim: Any, ambient: int, of_frames: int | None) -> int:
    dim = as_count(dim, "dim")
    if dim > ambient:
        raise InvalidInputError(
            "dim can't exceed the number of coordinates", got=f"dim={dim}", expected=f"at most {ambient}"
        )
    if of_frames is not None and dim != of_frames:
        raise ShapeError("dim and frames disagree", got=f"dim={dim}, frames of {of_frames} vectors")
    return dim


def _check_frames(frames: Any, n: int, ambient: int) -> np.ndarray:
    tensor = torch.as_tensor(frames).detach().cpu().double()
    check_ndim(tensor, 3, "frames", "(number of points, ambient dimension, dimension)")
    if tensor.shape[:2] != (n, ambient) or tensor.shape[2] > ambient:
        raise ShapeError(
            "frames don't fit the points", got=f"shape {tuple(tensor.shape)}", expected=f"({n}, {ambient}, m)"
        )
    array = tensor.numpy()
    gap = np.abs(np.einsum("nda,ndb->nab", array, array) - np.eye(array.shape[2])).max()
    if not gap < 1e-6:
        raise InvalidInputError("frames must be orthonormal", got=f"an error of {gap:.2g}")
    return array
