"""Sphinx builds this folder (developing.md says how). Every link must lead somewhere; a warning fails the build."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vlnorm_verl  # noqa: E402

project = "vlnorm-verl"
author = "the vlnorm-verl authors"
release = vlnorm_verl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 3
default_role = "code"  # docstrings have `names` as Markdown has them
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The reference needs signatures and docstrings only, so that the site builds in seconds, without verl and torch.
autodoc_mock_imports = ["torch", "numpy", "omegaconf", "psutil", "sympy", "verl", "wrapt"]

html_theme = "furo"
html_title = f"vlnorm-verl {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
copybutton_exclude = ".linenos, .gp, .c1"  # commands without their comments
