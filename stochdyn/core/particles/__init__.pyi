from .filtering import ParticleModel as ParticleModel
from .filtering import ParticleRun as ParticleRun
from .filtering import run_particles as run_particles
from .resampling import effective_size as effective_size
from .resampling import take_particles as take_particles
from .resampling import systematic as systematic
