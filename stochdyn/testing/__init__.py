"""Conformance suites: subclass one, implement its factory, and pytest checks that a class keeps its contract.

Example:
    >>> import torch
    >>> from stochdyn.core.coefficients import Scalar
    >>> class TestMyScalar(CoefficientSuite):
    ...     def make(self):
    ...         return Scalar(torch.tensor(0.5, dtype=torch.float64))
    >>> TestMyScalar().test_solve_is_the_pseudo_inverse()
"""

from __future__ import annotations

from stochdyn.testing.coefficients import CoefficientSuite
from stochdyn.testing.flows import MarginalFlowSuite
from stochdyn.testing.noise import NoiseProcessSuite
from stochdyn.testing.objectives import ObjectiveSuite
from stochdyn.testing.states import AnsatzSuite

__all__ = ["AnsatzSuite", "CoefficientSuite", "MarginalFlowSuite", "NoiseProcessSuite", "ObjectiveSuite"]
