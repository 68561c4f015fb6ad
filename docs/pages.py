"""What the site's pages need and Sphinx doesn't do by itself: exported names, formulas, and anchors of notebooks."""

import inspect
import re
from importlib import import_module
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from myst_parser.mdit_to_docutils.base import default_slugify
from sphinx.util.docutils import SphinxDirective


class Exported(SphinxDirective):
    """A module's docstring and each name that it exports; on a chapter's page only those that the face hasn't."""

    required_arguments = 1

    def run(self):
        module, face = import_module(self.arguments[0]), import_module("primia_lite")
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        lines, again = [f".. automodule:: {module.__name__}", "   :no-members:", ""], []
        for name in sorted(getattr(module, "__all__", own), key=str.lower):
            value, full = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.ismodule(value) or name.startswith("_"):
                continue
            if module is not face and getattr(face, name, None) is value:
                again.append(f":py:obj:`{name} <primia_lite.{name}>`")
            elif inspect.isclass(value):
                lines += [f".. autoclass:: {full}", "   :members:", ""]
            elif callable(value):
                lines += [f".. autofunction:: {full}", ""]
            else:
                lines += [f".. py:data:: {name}", f"   :module: {module.__name__}", ""]
        lines += [f"Also here: {', '.join(again)}."] if again else []
        return self.parse_text_to_nodes("\n".join(lines))


def describe(app, what, name, obj, options, lines):
    """In our docstrings `name : words` has words about a parameter, where numpydoc's would have a type."""
    lines[:] = "\n".join(re.sub(r"^(\*{0,2}\w[\w, *]*) : (.+)$", r"\1\n    \2", line) for line in lines).split("\n")


def notebook(app, docname, source):
    """JupyterLab's anchors, such as `#2-·-The-films`, become GitHub's. A control needs a running notebook."""
    if docname.startswith("notebooks/"):
        text = re.sub(r"\]\(#([^)]+)\)", lambda match: f"](#{default_slugify(match[1])})", source[0])
        source[0] = re.sub(r'"interactive\(children=.*"', '"(a control, in a running notebook)"', text)


def math(block):
    """Formulas as MathML, which browsers draw by themselves: nothing is fetched from elsewhere."""

    def visit(self, node):
        tex = re.sub(r"\\([Bb]ig)(?![a-zA-Z])", r"\\\1l", node.astext()).replace(r"\dots", r"\ldots")
        self.body.append(tex2mathml(tex, as_block=block))
        raise SkipNode

    return visit, None


def front_door(app, exception):
    """The site's address leads to its home."""
    if not exception and app.builder.format == "html":
        home = f'<!doctype html><meta http-equiv="refresh" content="0; url={app.config.root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(home, "utf-8")


def setup(app):
    app.add_directive("exported", Exported)
    app.add_html_math_renderer("mathml", math(block=False), math(block=True))
    app.connect("autodoc-process-docstring", describe, priority=400)  # before napoleon
    app.connect("source-read", notebook)
    app.connect("build-finished", front_door)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
