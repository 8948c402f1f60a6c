"""Configuration of the documentation: Sphinx with MyST and furo; docstrings are read from the installed package.

The tutorials are notebooks in text: MyST-NB runs them when the documentation is built, and their output and figures are on the page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import stochdyn

sys.path.insert(0, str(Path(__file__).parent))

project = "stochdyn"
author = "The stochdyn developers"
copyright = "2026, the stochdyn developers"
version = release = stochdyn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "api_pages",
    "choosing_chart",
    "diagram",
    "references",
    "tables",
]
# The pages of source code take two thirds of the time of a build; ``-t quick`` leaves them out.
if not tags.has("quick"):  # type: ignore[name-defined]  # noqa: F821
    extensions.append("sphinx.ext.viewcode")
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "generated"]  # generated: tables that other pages include
nitpicky = False

# A page that can't be run is an error; a page that hasn't changed isn't run again.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent / "matplotlibrc")

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def setup(app: object) -> None:
    """Leave out what Python writes about the fields of named tuples."""

    def skip(app: object, what: str, name: str, obj: object, skipped: bool, options: object) -> bool | None:
        return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)  # type: ignore[attr-defined]


html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"stochdyn {release}"

# Fields named "mean" exist in many classes; the plain word in a docstring links to none of them.
suppress_warnings = ["ref.python"]
