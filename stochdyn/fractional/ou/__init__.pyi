from .process import FractionalOU as FractionalOU
