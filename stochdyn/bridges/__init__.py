"""Multi-marginal Schrödinger bridges whose reference process is refined.

Snapshots of a population at a few times, without knowledge of who is who, become a law on whole trajectories: the
one that is nearest in relative entropy to a reference process among all that have these marginals; and the reference
is chosen from a family of models so that it is nearest in turn.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
