from .posterior import FractionalOUPosterior as FractionalOUPosterior
from .posterior import Problem as Problem
from .posterior import joint_covariance as joint_covariance
from .process import FractionalOU as FractionalOU
