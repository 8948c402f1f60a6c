"""Conformance suites: subclass one, implement its factory, and pytest checks that a class keeps its contract.

Example:
    >>> import torch
    >>> from stochdyn.core.coefficients import Scalar
    >>> class TestMyScalar(CoefficientSuite):
    ...     def make(self):
    ...         return Scalar(torch.tensor(0.5, dtype=torch.float64))
    >>> TestMyScalar().test_solve_is_the_pseudo_inverse()
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
