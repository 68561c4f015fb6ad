"""``primia-lite data`` and ``primia-lite ledger``: what there is, as text and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from primia_lite.config import UserError, data_root
from primia_lite.data import SPLITS, ChestXrays, sources
from primia_lite.data.pixels import listed
from primia_lite.runtime import seed_for, write_atomic


def list_sources() -> str:
    rows = sources()
    width = max(len(row["name"]) for row in rows)
    lines = [f"films are looked for in {data_root()} (PRIMIA_LITE_DATA)"]
    for row in rows:
        files = f", {row['n_files']:,} files" if row["n_files"] else ""
        state = f"found  {row['where'] or 'built in'}{files}" if row["found"] else f"absent {row['how_to_get']}"
        lines.append(f"{row['name']:<{width}}  {state}")
    return "\n".join(lines)


def table(films: ChestXrays) -> str:
    """Films of each class and patients, by split and by site. For whoever holds the films."""

    def counted(kind: str, group: np.ndarray, names: Sequence[str]) -> str:
        rows = [(kind, *films.class_names, "films", "patients")]
        for name, here in [*((name, group == name) for name in names), ("all", np.full(len(films), True))]:
            by_class = np.bincount(films.labels[here], minlength=len(films.class_names)).tolist()
            rows.append((name, *by_class, int(here.sum()), len(np.unique(films.patient_id[here]))))
        return _columns(rows)

    name = f"{films.source} (procedural, no patients)" if films.source == "phantom" else films.source
    parts = [
        f"{name}: {films.size} x {films.size} px, content {films.fingerprint()}",
        counted("split", films.split, SPLITS),
        counted("site", films.site, films.sites),
    ]
    if films.skipped:
        parts.append(f"left out, unreadable: {len(films.skipped)} ({listed(films.skipped)})")
    return "\n\n".join(parts)


def _columns(rows: list[tuple]) -> str:
    text = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in text
    )


def sheet(films: ChestXrays, per_class: int = 8) -> np.ndarray:
    """Films of each class, one class a row, different patients first: uint8 [classes * size, per_class * size]."""
    rng = np.random.default_rng(seed_for(0, "contact sheet"))
    rows = []
    for k in range(len(films.class_names)):
        index = rng.permutation(np.flatnonzero(films.labels == k))
        # A stable sort on "seen this patient before" puts each patient's first film ahead of their second.
        _, first = np.unique(films.patient_id[index], return_index=True)
        repeated = np.ones(len(index), dtype=bool)
        repeated[first] = False
        index = index[np.argsort(repeated, kind="stable")][:per_class]
        row = np.zeros((films.size, per_class * films.size), np.uint8)
        if len(index):
            row[:, : len(index) * films.size] = np.hstack(list(films.images[index]))
        rows.append(row)
    return np.vstack(rows)


def save_sheet(films: ChestXrays, path: str | Path, per_class: int = 8) -> Path:
    """Save the contact sheet as PNG, a line of text above each row."""
    from PIL import Image, ImageDraw

    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: the contact sheet is a PNG, so give a name that ends in .png")
    pixels, line = sheet(films, per_class), 16
    canvas = Image.new("L", (pixels.shape[1], pixels.shape[0] + line * len(films.class_names)))
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(films.class_names):
        top = k * (films.size + line)
        count = int((films.labels == k).sum())
        draw.text((3, top + 2), f"{films.source}: {name} (n = {count})", fill=255)
        canvas.paste(Image.fromarray(pixels[k * films.size : (k + 1) * films.size]), (0, top + line))
    return write_atomic(path, lambda file: canvas.save(file, "PNG"))


def ledger(path: str | Path) -> str:
    """Every charge of a privacy ledger, what is spent by each way of counting, and the budget."""
    from primia_lite.privacy.ledger import Ledger

    book = Ledger(path)
    rows = [("time", "release", "sigma", "q", "steps", "unit", "code", "epsilon so far (filter)")]
    rows += [
        (r["time"], r["what"], f"{r['noise_multiplier']:g}", f"{r['sample_rate']:g}", r["steps"], r["unit"], r["code"],
         f"{r['filter_epsilon']:.3f}") for r in book.statement()
    ]  # fmt: skip
    spent = book.spent()
    rule = {
        "plan": "its plan, fixed before the first charge, counts by PLD and allows nothing else",
        "filter": f"an RDP filter of order {spent['order']} decides, valid for parameters chosen along the way",
    }[spent["rule"]]
    return "\n".join([
        _columns(rows),
        "",
        f"spent   epsilon {spent['epsilon']:.3f} of {spent['budget']:g} at delta {spent['delta']:g}, for one "
        f"{spent['unit']}, zero-out (there or empty)",
        f"        by the filter {spent['filter']:.3f}; by PLD, if all was fixed in advance, {spent['pld']:.3f}",
        f"rule    {rule}",
    ])  # fmt: skip
