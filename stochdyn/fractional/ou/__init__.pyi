from .process import FractionalOU as FractionalOU
from .inference import infer_fou as infer_fou
from .contrasts import Contrasts as Contrasts
from .contrasts import variogram_shape as variogram_shape
