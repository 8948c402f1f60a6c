"""Markov jump processes on finitely many states, and chemical reaction networks.

Rates are matrices whose **rows** sum to zero: ``Q[i, j]`` is the rate from state i to state j. The master equations of
:mod:`stochdyn.core` have columns that sum to zero; :meth:`JumpMeasure.forward` turns the one into the other.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
