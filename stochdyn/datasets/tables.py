"""Seven small tables of real data, as columns by name: what ``sd.Panel`` and ``pandas.DataFrame`` take."""

from __future__ import annotations

from stochdyn.datasets._csv import read_columns

__all__ = [
    "brain_at_rest",
    "hudson_bay",
    "school_influenza",
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
