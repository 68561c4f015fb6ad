"""Sphinx's settings for the site (`make docs`). Its sources are the checkout's files, so that GitHub's links hold."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = html_title = "primia_lite"
author = copyright = "the primia_lite contributors"
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/**.ipynb", "data/README.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "runs", "shared", "primia_lite", "tests", "**/.*"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "pages"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
nb_merge_streams = True
napoleon_use_ivar = True
napoleon_use_rtype = False
autodoc_typehints_format = "short"

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False
