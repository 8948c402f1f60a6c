"""Laws of stochastic processes: equations, noise, path measures, and what is exact about them."""
