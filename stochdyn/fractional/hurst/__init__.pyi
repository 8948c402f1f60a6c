from .guide import HurstGuide as HurstGuide
from .guide import hurst_model as hurst_model
from .inference import infer_hurst as infer_hurst
from .laws import Law as Law
from .roughness import averaged_autocovariance as averaged_autocovariance
from .roughness import infer_roughness as infer_roughness
