r"""Entropy production and probability currents of steady states, of diffusions and of jump processes.

Signs and halves: :math:`dX=F\,dt+G\,dW` (Itô), :math:`D=GG^\top/2`, and the drift of thermodynamics is :math:`f=F-\nabla\cdot D`. The
current is :math:`J=\rho v` with the velocity :math:`v=f-D\nabla\log\rho`, and entropy is produced at the rate
:math:`E[v\cdot D^{-1}v]` in units of Boltzmann's constant per time.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
