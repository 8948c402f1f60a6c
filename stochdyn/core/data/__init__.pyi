from .frames import read_column as read_column
from .panel import Panel as Panel
from .panel_grid import PanelGrid as PanelGrid
