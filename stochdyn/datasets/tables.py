"""Small tables of real data, as columns by name: what ``sd.Panel`` and ``pandas.DataFrame`` take."""

from __future__ import annotations

from importlib.resources import files

import numpy as np

from stochdyn.datasets._csv import read_columns

__all__ = [
    "brain_at_rest",
    "hudson_bay",
    "muscle_cells",
    "photon_pairs",
    "rio_negro",
    "school_influenza",
    "single_molecules",
    "sitka_spruces",
    "stock_indices",
    "sunspots",
    "theophylline",
]

Columns = dict[str, list[float]]


def brain_at_rest() -> Columns:
    """Return the activity of 28 regions of a resting person's brain, from 250 scans by magnetic resonance, 1.89 seconds apart.

    Returns:
        The column ``seconds``, and one by the name of each region (``LCau``, the left caudate nucleus, ...) in arbitrary units without a
        mean, 250 values each.

    Example:
        >>> table = brain_at_rest()
        >>> len(table), len(table["LCau"])
        (29, 250)

    Reference:
        Example data of the Python package nitime (BSD licence), Rokem, Trumpis and Pérez, "Nitime: time-series analysis for neuroimaging
        data", 2009.
    """
    return read_columns("brain_at_rest")


def hudson_bay() -> Columns:
    """Return the furs of hares and lynxes that the Hudson's Bay Company bought, in thousands, for the years 1900 to 1920.

    Returns:
        The columns ``year``, ``hare`` and ``lynx``, 21 values each.

    Example:
        >>> table = hudson_bay()
        >>> table["year"][0], table["hare"][0], table["lynx"][0]
        (1900.0, 30.0, 4.0)

    Reference:
        P. Howard, Modeling basics, lecture notes, Texas A&M University, 2009, after E. P. Odum, Fundamentals of Ecology, 1953.
    """
    return read_columns("hudson_bay")


def muscle_cells() -> Columns:
    """Return the activity of ten genes in 271 human muscle cells, 0, 24, 48 and 72 hours after they were told to stop dividing.

    Cells are destroyed when they are read, so no cell is seen twice. Two genes belong to cell division (``CDK1``, ``CCNB2``), two to cells
    that aren't specialised (``ID1``, ``MYF5``), two switch others on (``MYOG``, ``MEF2C``), and four belong to fibres (``MYH3``, ``TNNT1``,
    ``ENO3``, ``ACTA1``).

    Returns:
        The column ``hours`` and one by the name of each gene, 271 values each: the decimal logarithm of one plus the fragments per kilobase
        and million.

    Example:
        >>> table = muscle_cells()
        >>> [table["hours"].count(t) for t in (0, 24, 48, 72)]
        [69, 74, 79, 49]

    Reference:
        C. Trapnell et al., "The dynamics and regulators of cell fate decisions are revealed by pseudotemporal ordering of single cells",
        Nature Biotechnology 32, 2014; the Bioconductor package HSMMSingleCell 1.18.0 (Artistic licence 2.0).
    """
    return read_columns("muscle_cells")


def photon_pairs() -> dict[str, int]:
    """Return how often both photons of a pair passed their polarisers, for sixteen settings of the two.

    The letters are the polarisations that passed: horizontal, vertical, diagonal, and circular to the right or left. Every setting was
    held as long as the others, and photons that were stopped weren't counted.

    Returns:
        Sixteen counts by setting.

    Example:
        >>> counts = photon_pairs()
        >>> counts["HH"], counts["HV"], counts["VV"], counts["VH"]
        (34749, 324, 35805, 444)

    Reference:
        D. F. V. James, P. G. Kwiat, W. J. Munro and A. G. White, "Measurement of qubits", Physical Review A 64, 052312, 2001, section III.
    """
    settings = (
        "HH", "HV", "VV", "VH", "RH", "RV", "DV", "DH", "DR", "DD", "RD", "HD", "VD", "VL", "HL", "RL",
    )  # fmt: skip
    counts = (
        34749, 324, 35805, 444, 16324, 17521, 13441, 16901, 17932, 32028, 15132, 17238, 13171, 17170, 16722, 33586,
    )  # fmt: skip
    return dict(zip(settings, counts, strict=True))


def rio_negro() -> Columns:
    """Return the height of the Rio Negro at Manaus above the mean of its month, in metres, from January 1903 to December 1992.

    Monthly means of daily readings, near the mouth of the river into the Amazon.

    Returns:
        The columns ``year``, ``month`` (1 to 12) and ``height``, 1080 values each.

    Example:
        >>> table = rio_negro()
        >>> table["year"][-1], table["month"][-1], table["height"][-1]
        (1992.0, 12.0, 0.316667)

    Reference:
        H. O'R. Sternberg, "Aggravation of floods in the Amazon river as a consequence of deforestation?", Geografiska Annaler 69A, 1987; the
        table manaus of the R package boot 1.3 (no restrictions).
    """
    return read_columns("rio_negro")


def school_influenza() -> Columns:
    """Return the boys of a boarding school in bed with influenza, and those recovering, for 14 days from 22 January 1978.

    Of 763 boys, 512 fell ill. A boy was in bed for some days and then kept apart while he recovered.

    Returns:
        The columns ``day`` (0 is the first), ``in_bed`` and ``convalescent``, 14 values each.

    Example:
        >>> max(school_influenza()["in_bed"])
        298.0

    Reference:
        Anonymous, "Influenza in a boarding school", British Medical Journal 1, 587, 1978.
    """
    return read_columns("school_influenza")


def single_molecules() -> Columns:
    """Return the ways of 1000 single molecules in living cells, seen 134 times a second under a microscope.

    Each was followed from frame to frame (7.48 ms apart) until it bleached or left the focal plane, half a dozen frames later at most.

    Returns:
        The columns ``track`` (0 to 999), ``frame``, ``x`` and ``y`` (in micrometres), 5071 values each, track by track.

    Example:
        >>> table = single_molecules()
        >>> len(table["x"]), table["track"].count(0.0)
        (5071, 4)

    Reference:
        Example data of the Python package saspt 0.4.0 (MIT licence), rounded to nanometres. A. Heckert, L. Dahal, R. Tjian and X. Darzacq,
        "Recovering mixtures of fast-diffusing states from short single-particle trajectories", eLife 11, e70169, 2022.
    """
    path = files("stochdyn.datasets").joinpath("single_molecules.npz")
    with path.open("rb") as stream, np.load(stream) as data:
        parts = {name: data[name].astype(int) for name in data.files}
    lengths = parts["length"]
    first = np.cumsum(lengths) - lengths
    track = np.repeat(np.arange(len(lengths)), lengths)
    since = np.arange(lengths.sum()) - first[track]
    columns = {"track": track, "frame": parts["frame"][track] + since}
    for name in ("x", "y"):  # a start, and steps in nanometres
        walked = np.cumsum(parts[f"d{name}"])
        columns[name] = (parts[name][track] + walked - walked[first][track]) / 1000
    return {name: values.astype(float).tolist() for name, values in columns.items()}


def sitka_spruces() -> Columns:
    """Return the sizes of 79 Sitka spruces on five days of 1988; 54 of them grew in air with ozone.

    Returns:
        The columns ``tree`` (1 to 79), ``day`` of the year, ``ozone`` (1 with, 0 without) and ``size`` (the logarithm of height times squared
        diameter), 395 values each, tree by tree.

    Example:
        >>> table = sitka_spruces()
        >>> table["day"][:5], table["size"][0]
        ([152.0, 174.0, 201.0, 227.0, 258.0], 4.51)

    Reference:
        P. J. Diggle, K.-Y. Liang and S. L. Zeger, Analysis of Longitudinal Data, 1994; the table Sitka of the R package MASS.
    """
    return read_columns("sitka_spruces")


def stock_indices() -> Columns:
    """Return closing values of four European stock indices on 1860 business days, from the middle of 1991 to August 1998.

    Returns:
        The columns ``day`` (0, 1, ... without weekends and holidays), ``DAX`` (Germany), ``SMI`` (Switzerland), ``CAC`` (France) and
        ``FTSE`` (Britain).

    Example:
        >>> len(stock_indices()["DAX"])
        1860

    Reference:
        The table EuStockMarkets of the R package datasets, provided by Erste Bank AG, Vienna.
    """
    return read_columns("stock_indices")


def sunspots() -> Columns:
    """Return the mean number of sunspots of each year from 1700 to 2008.

    Returns:
        The columns ``year`` and ``number``, 309 values each.

    Example:
        >>> sunspots()["number"][:2]
        [5.0, 11.0]

    Reference:
        National Geophysical Data Center, in the public domain; this copy from the package statsmodels.
    """
    return read_columns("sunspots")


def theophylline() -> Columns:
    """Return concentrations of theophylline in the blood of 12 people over the 25 hours after they took a dose by mouth.

    Returns:
        The columns ``subject`` (1 to 12), ``weight`` (kg), ``dose`` (mg per kg of weight), ``time`` (hours) and
        ``concentration`` (mg per litre), 132 values each.

    Example:
        >>> table = theophylline()
        >>> len(set(table["subject"])), max(table["concentration"])
        (12, 11.4)

    Reference:
        A. J. Boeckmann, L. B. Sheiner and S. L. Beal, NONMEM Users Guide V, 1994, a study of R. Upton; the table Theoph of the R package datasets.
    """
    return read_columns("theophylline")
