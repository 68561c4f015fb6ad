"""The documentation is true: marked blocks run, the others at least parse, commands and links exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from blocks import Block, blocks

from primia_lite.apps import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = ROOT / "README.md"
SHELL, PYTHON = {"bash", "sh", "shell"}, {"python", "py"}

ALL = [
    pytest.param(page, b, id=f"{page.relative_to(ROOT)}:{b.line}")
    for page in PAGES
    for b in blocks(page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "block"), [p for p in ALL if p.values[1].run])
def test_marked_block_runs(page: Path, block: Block, tmp_path):
    """In the checkout, with this environment first on the path; an indented or shell block stops at its first error."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path)}
    if block.language in SHELL:
        command = ["bash", "-euo", "pipefail", "-c", block.code]
    else:
        assert block.language in PYTHON, f"{page.name}:{block.line}: mark only bash and python blocks"
        command = [sys.executable, "-c", block.code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{page.name}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(("page", "block"), ALL)
def test_block_parses(page: Path, block: Block):
    if block.language in PYTHON:
        compile(block.code, f"{page.name}:{block.line}", "exec")
    elif block.language in SHELL and shutil.which("bash"):
        done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
        assert done.returncode == 0, f"{page.name}:{block.line}: {done.stderr}"


def test_readme_has_the_two_commands():
    lines = [line.split("#")[0].strip() for b in blocks(README.read_text()) if b.language in SHELL
             for line in b.code.splitlines()]  # fmt: skip
    assert "make run" in lines and "make test" in lines


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_and_commands_exist(page: Path, capsys):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.findall(r"^ {4}([a-z]+)", capsys.readouterr().out, re.MULTILINE))
    code = [b.code for b in blocks(page.read_text("utf-8"))] + re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))
    for text in code:
        for target in re.findall(r"^\s*make ([a-z][a-z-]*)\b", text, re.MULTILINE):
            assert target in targets, f"make {target}: no such target"
        for command in re.findall(r"^\s*(?:\S*/)?primia-lite ([a-z]+)", text, re.MULTILINE):
            assert command in commands, f"primia-lite {command}: no such command"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_our_files_lead_somewhere(page: Path):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    broken = [
        link for link in links
        if not re.match(r"[a-z]+:|#", link) and not (page.parent / link.partition("#")[0]).exists()
    ]  # fmt: skip
    assert not broken, f"{page.relative_to(ROOT)}: {broken}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_path_of_one_machine(page: Path):
    assert not re.findall(r"(?:/home/|/Users/|/root/|/work/)\w*", page.read_text("utf-8"))


def test_readme_lists_every_notebook():
    text = README.read_text()
    assert [p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb")) if p.name not in text] == []
