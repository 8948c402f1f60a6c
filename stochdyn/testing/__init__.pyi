from .coefficients import CoefficientSuite as CoefficientSuite
from .flows import MarginalFlowSuite as MarginalFlowSuite
from .laws import PathMeasureSuite as PathMeasureSuite
from .noise import NoiseProcessSuite as NoiseProcessSuite
from .objectives import ObjectiveSuite as ObjectiveSuite
from .states import AnsatzSuite as AnsatzSuite
