"""Fenced code blocks of Markdown files. A block after the comment ``<!-- doctest -->`` is run by the tests."""

from __future__ import annotations

import re
from dataclasses import dataclass

FENCE = re.compile(
    r"(?P<mark><!--\s*doctest\s*-->\s*\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    line: int  # of its first line of code, from 1
    language: str
    code: str
    run: bool


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in order."""
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["body"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(line, match["language"], code, bool(match["mark"])))
    return found
