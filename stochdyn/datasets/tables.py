"""Five small tables of real data, as columns by name: what ``sd.Panel`` and ``pandas.DataFrame`` take."""

from __future__ import annotations

from stochdyn.datasets._csv import read_columns

__all__ = ["hudson_bay", "school_influenza", "stock_indices", "sunspots", "theophylline"]

Columns = dict[str, list[float]]


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
