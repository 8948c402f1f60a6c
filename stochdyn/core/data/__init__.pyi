from .doses import Doses as Doses
from .interpolation import Interpolation as Interpolation
from .frames import read_column as read_column
from .panel_grid import PanelGrid as PanelGrid
