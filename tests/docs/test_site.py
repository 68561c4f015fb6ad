"""The site builds without a warning, no link inside leads nowhere, and notebooks' pages show their pictures."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-docs" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NOTEBOOKS = [path.relative_to(ROOT) for path in sorted((ROOT / "notebooks").rglob("[0-9]*.ipynb"))]
COMMAND = [PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", "."]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not PYTHON.exists():
        pytest.skip("the site's environment isn't there: make docs-setup")
    html = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run([*COMMAND, html], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return html


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places.add(found.get("id"))
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def test_no_link_inside_is_dead(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in map(urlsplit, page.links):
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            places = pages[target].places if target in pages else {"", unquote(link.fragment)}
            if not (target.is_file() and unquote(link.fragment) in places):
                dead.append(f"{path.relative_to(site)}: {link.geturl()}")
    assert len(pages) > len(NOTEBOOKS) and dead == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_page_shows_its_committed_pictures(site, notebook):
    html = site / notebook.with_suffix(".html")
    shown = {(html.parent / link).read_bytes() for link in Page(html).links if "/_images/" in link}
    outputs = [o for c in json.loads((ROOT / notebook).read_text("utf-8"))["cells"] for o in c.get("outputs", [])]
    pictures = [value for o in outputs for kind, value in o.get("data", {}).items() if kind.startswith("image/")]
    assert {base64.b64decode("".join(picture)) for picture in pictures} <= shown
