"""Conformance suites and checkers of invariances, for our own classes and for those of users.

Subclass a suite, implement its factory, and pytest checks that a class keeps its contract. The checkers (``check_units``,
``check_company`` and others) take any function, and raise where its answer depends on what it mustn't depend on.

Example:
    >>> import torch
    >>> from stochdyn.core import Scalar
    >>> from stochdyn.testing import CoefficientSuite
    >>> class TestMyScalar(CoefficientSuite):
    ...     def make(self):
    ...         return Scalar(torch.tensor(0.5, dtype=torch.float64))
    >>> TestMyScalar().test_solve_is_the_pseudo_inverse()
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
