"""Sphinx's settings for the site (`make docs`). Its sources are the checkout's own files, so that links are those of GitHub."""

import re

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.mdit_to_docutils.base import default_slugify

project = "primia_lite"
author = "the primia_lite authors"
copyright = "the primia_lite authors, Apache-2.0"
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/**.ipynb", "data/README.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "runs", "shared", "primia_lite", "tests", "**/.ipynb_checkpoints"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_ipywidgets_js = {}
autodoc_typehints_format = "short"
html_theme = "furo"
html_title = "primia_lite"
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"


def jupyter_anchors(app, docname, source):
    """Anchors in notebooks are written as JupyterLab makes them: `#2-·-The-films`."""
    if docname.startswith("notebooks/"):
        source[0] = re.sub(r"\]\(#([^)]+)\)", lambda match: f"](#{default_slugify(match[1])})", source[0])


def math(block):
    """Formulas as MathML, which browsers draw by themselves: nothing is fetched from elsewhere."""

    def visit(self, node):
        tex = re.sub(r"\\([Bb]ig)(?![a-zA-Z])", r"\\\1l", node.astext()).replace(r"\dots", r"\ldots")
        self.body.append(tex2mathml(tex, as_block=block))
        raise SkipNode

    return visit, None


def setup(app):
    app.connect("source-read", jupyter_anchors)
    app.add_html_math_renderer("mathml", math(block=False), math(block=True))
