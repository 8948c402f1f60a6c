"""Frames: published overlaps and estimators, identities of dual frames, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.errors import FrameError, InvalidInputError, ShapeError, ZeroProbabilityError
from stochdyn.povm import FourPauli, Frame, QutritSIC, SiteFrames, Tetrahedral, named_operator, spin_matrices
from stochdyn.povm.frames import as_operator, as_state, operator_rank, product_dual, product_effects

F64, C128 = torch.float64, torch.complex128
FRAMES = [Tetrahedral(), Tetrahedral(rotated=False), FourPauli(), QutritSIC()]
QUBIT = FRAMES[:3]


def ids(frame: Frame) -> str:
    return frame.name


def random_state(size: int) -> Tensor:
    m = torch.randn(size, size, dtype=C128)
    rho = m @ m.mH
    return rho / rho.diagonal().sum()


@pytest.mark.parametrize("frame", FRAMES, ids=ids)
def test_dual_is_biorthogonal(frame: Frame) -> None:
    products = torch.einsum("aij,bji->ab", frame.dual, frame.effects)
    torch.testing.assert_close(products, torch.eye(frame.num_outcomes, dtype=C128), atol=1e-12, rtol=0)


@pytest.mark.parametrize("frame", FRAMES, ids=ids)
@pytest.mark.parametrize("sites", [1, 2, 3])
def test_probabilities_determine_the_state_and_every_observable(frame: Frame, sites: int) -> None:
    if frame.dim**sites > 9:
        sites = 2
    size = frame.dim**sites
    rho = random_state(size)
    p = frame.probabilities(rho)
    assert p.shape == (frame.num_outcomes**sites,)
    assert abs(float(p.sum()) - 1) < 1e-12
    assert float(p.min()) > 0
    direct = torch.einsum("ij,aji->a", rho, product_effects([frame] * sites)).real
    torch.testing.assert_close(p, direct)
    torch.testing.assert_close(frame.reconstruct(p), rho, atol=1e-12, rtol=0)
    h = torch.randn(size, size, dtype=C128)
    h = h + h.mH
    values = frame.coefficients(h)
    assert values.dtype == F64
    direct = torch.einsum("ij,aji->a", h, product_dual([frame] * sites)).real
    torch.testing.assert_close(values, direct)
    assert abs(float(p @ values) - float(torch.trace(rho @ h).real)) < 1e-10


def test_overlaps_are_the_published_ones() -> None:
    for frame in QUBIT[:2]:
        torch.testing.assert_close(frame.overlap, (torch.eye(4, dtype=F64) * 2 + 1) / 12)
        torch.testing.assert_close(frame.inverse_overlap, 6 * torch.eye(4, dtype=F64) - 1)
        assert abs(frame.condition_number - 3) < 1e-9
        torch.testing.assert_close(frame.dual, 6 * frame.effects - torch.eye(2, dtype=C128))
    four = torch.tensor([[2, 1, 1, 2], [1, 2, 1, 2], [1, 1, 2, 2], [2, 2, 2, 12]], dtype=F64) / 18
    inverse = torch.tensor([[14, -4, -4, -1], [-4, 14, -4, -1], [-4, -4, 14, -1], [-1, -1, -1, 2]], dtype=F64)
    torch.testing.assert_close(FourPauli().overlap, four)
    torch.testing.assert_close(FourPauli().inverse_overlap, inverse)
    assert abs(FourPauli().condition_number - 13.2915) < 1e-4
    sic = QutritSIC()
    torch.testing.assert_close(sic.overlap, (3 * torch.eye(9, dtype=F64) + 1) / 36)
    torch.testing.assert_close(sic.dual, 12 * sic.effects - torch.eye(3, dtype=C128))


def test_estimators_are_the_published_ones() -> None:
    r2, r3, r6 = math.sqrt(2), math.sqrt(3), math.sqrt(6)
    table = {
        "X": ([r3, r3, -r3, -r3], [0, 2 * r2, -r2, -r2], [-1, 5, -1, -1]),
        "Y": ([r3, -r3, r3, -r3], [0, 0, r6, -r6], [-1, -1, 5, -1]),
        "Z": ([r3, -r3, -r3, r3], [3, -1, -1, -1], [5, -1, -1, -1]),
    }
    for name, rows in table.items():
        for frame, row in zip(QUBIT, rows, strict=True):
            torch.testing.assert_close(
                frame.coefficients(name), torch.tensor(row, dtype=F64), atol=1e-12, rtol=0
            )


@pytest.mark.parametrize(("frame", "variance"), [(QUBIT[0], 3), (QUBIT[1], 3), (QUBIT[2], 5)])
def test_variance_of_pauli_strings_grows_as_published(frame: Frame, variance: int) -> None:
    for k in (1, 2, 3):
        p = frame.probabilities(torch.eye(2**k, dtype=C128) / 2**k)
        o = frame.coefficients("Z" * k)
        assert abs(float(p @ o.square()) - variance**k) < 1e-9
        assert abs(float(p @ o)) < 1e-12


def test_rotated_corners_see_all_pauli_states() -> None:
    for state in ("up", "down", "x+", "x-", "y+", "y-"):
        p = Tetrahedral().positive_probabilities(state)
        torch.testing.assert_close(
            p.sort().values,
            torch.tensor([0.105662, 0.105662, 0.394338, 0.394338], dtype=F64),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("frame", "state"),
    [(QUBIT[1], "down"), (QUBIT[2], "down"), (QUBIT[2], "x-"), (QUBIT[2], "y-")],
)
def test_impossible_outcomes_name_the_frame_to_use(frame: Frame, state: str) -> None:
    with pytest.raises(
        ZeroProbabilityError, match=rf"of {frame.name.split('(')[0]}.*{state}.*Use Tetrahedral\(\)"
    ):
        frame.positive_probabilities(state)


def test_an_impossible_outcome_of_the_rotated_tetrahedron() -> None:
    frame = Tetrahedral()
    orthogonal = torch.linalg.eigh(frame.effects[2])[1][:, 0]
    with pytest.raises(ZeroProbabilityError, match="outcome 2"):
        frame.positive_probabilities(orthogonal)
    with pytest.raises(ZeroProbabilityError, match="Turn the frame"):
        QutritSIC().positive_probabilities([0.0, 1.0, 1.0])


def test_a_turned_frame_gives_the_turned_state() -> None:
    u = torch.linalg.qr(torch.randn(2, 2, dtype=C128))[0]
    rho = random_state(2)
    turned = Tetrahedral().rotated(u)
    torch.testing.assert_close(turned.probabilities(u @ rho @ u.mH), Tetrahedral().probabilities(rho))
    with pytest.raises(FrameError, match="sum to the identity"):
        Tetrahedral().rotated(2 * torch.eye(2))


def test_an_overcomplete_frame_works() -> None:
    states = [as_state(s, 2) for s in ("z+", "z-", "x+", "x-", "y+", "y-")]
    frame = Frame(torch.stack(states) / 3, name="octahedron")
    rho = random_state(4)
    p = frame.probabilities(rho)
    torch.testing.assert_close(frame.reconstruct(p), rho, atol=1e-12, rtol=0)
    assert (
        abs(float(p @ frame.coefficients("XZ")) - float(torch.trace(rho @ named_operator("XZ")).real)) < 1e-12
    )


def test_frames_that_differ_by_site() -> None:
    frames = SiteFrames([Tetrahedral(), FourPauli(), Tetrahedral(rotated=False)])
    p = frames.probabilities(["up", "x+", "y-"])
    torch.testing.assert_close(p[1], FourPauli().probabilities("x+"))
    assert frames.at(2).name == "Tetrahedral(rotated=False)"
    with pytest.raises(ZeroProbabilityError):
        frames.positive_probabilities("down")
    with pytest.raises(InvalidInputError, match="one state for each site"):
        frames.probabilities(["up", "up"])
    with pytest.raises(FrameError, match="4 outcomes on 2 levels and 9 outcomes on 3 levels"):
        SiteFrames([Tetrahedral(), QutritSIC()])


E4 = torch.eye(2, dtype=C128)[None]
BAD_FRAMES = {
    "not complete": (Tetrahedral().effects[:3], "sum to the identity"),
    "not positive": (torch.cat([E4 * 1.5, -E4 * 0.5]), "positive"),
    "not Hermitian": (torch.stack([torch.tensor([[0.5, 0.5], [0, 0.5]])] * 2), "Hermitian"),
    "not informationally complete": (
        torch.stack([as_state("up", 2), as_state("down", 2)]),
        r"informationally complete; got effects that span 2 dimensions; expected 4",
    ),
    "three in a plane": (
        torch.stack(
            [
                (E4[0] + math.cos(a) * named_operator("X") + math.sin(a) * named_operator("Z")) / 3
                for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
            ]
        ),
        "span 3 dimensions",
    ),
    "a single matrix": (torch.eye(2), r"\(K, d, d\)"),
    "not finite": (E4 * math.nan, "finite"),
}


@pytest.mark.parametrize("row", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_unfit_effects_are_refused(row) -> None:
    with pytest.raises(FrameError, match=row[1]):
        Frame(row[0])


def test_operators_by_name() -> None:
    x, y, z = (named_operator(n) for n in "XYZ")
    torch.testing.assert_close(x @ y, 1j * z)
    torch.testing.assert_close(named_operator("sigma-"), (x - 1j * y) / 2)
    torch.testing.assert_close(named_operator("XZ"), torch.kron(x, z))
    torch.testing.assert_close(named_operator("+-"), named_operator("sigma+ sigma-"))
    torch.testing.assert_close(as_operator(["X", z], 2), torch.kron(x, z))
    assert [operator_rank(n) for n in ("X", "XYZ", "sigma- Z")] == [1, 3, 2]
    for d in (2, 3, 4):
        s = spin_matrices(d)
        torch.testing.assert_close(s["Sx"] @ s["Sy"] - s["Sy"] @ s["Sx"], 1j * s["Sz"])
        casimir = sum(s[n] @ s[n] for n in ("Sx", "Sy", "Sz"))
        torch.testing.assert_close(casimir, (d * d - 1) / 4 * torch.eye(d, dtype=C128))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("sideways", "unknown state"),
        ([0.0, 0.0], "no direction"),
        ([[1.0, 1.0], [0.0, 0.0]], "Hermitian"),
        ([[1.0, 0.0], [0.0, 1.0]], "trace one"),
        ([[1.5, 0.0], [0.0, -0.5]], "positive"),
    ],
)
def test_states_that_are_none(state, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Tetrahedral().probabilities(state)


def test_operators_that_fit_nothing() -> None:
    with pytest.raises(InvalidInputError, match=r"'Q' in 'Q Z'"):
        named_operator("Q Z")
    with pytest.raises(ShapeError, match="power of the number of levels"):
        Tetrahedral().coefficients(torch.eye(3))
    with pytest.raises(ShapeError, match="square"):
        Tetrahedral().coefficients(torch.ones(2, 3))
