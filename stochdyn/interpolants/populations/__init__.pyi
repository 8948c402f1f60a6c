from .compare import PopulationComparison as PopulationComparison
from .compare import compare_populations as compare_populations
from .data import Populations as Populations
from .encoder import SetEncoder as SetEncoder
from .generator import PopulationGenerator as PopulationGenerator
from .regression import PopulationRegression as PopulationRegression
