"""A hospital's own account of what it has released. A release is charged before it is computed, never after.

One SQLite file per hospital. A crash can charge a release that never left; it can't release one that wasn't charged.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from primia_lite.config import BudgetError, UserError
from primia_lite.privacy.accounting import Release, epsilon, merge

_SCHEMA = """
CREATE TABLE IF NOT EXISTS budget (target_epsilon REAL NOT NULL, target_delta REAL NOT NULL, unit TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS charges (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, what TEXT NOT NULL UNIQUE,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL
);
"""


class Ledger:
    """Charges of one hospital against one budget (ε, δ) per unit.

    Raises
    ------
    UserError
        The file was opened before with another budget, or isn't a ledger.
    """

    def __init__(self, path: str | Path, target_epsilon: float, target_delta: float, unit: str = "film"):
        self.path = Path(path)
        self.target_epsilon, self.target_delta = target_epsilon, target_delta
        self._affordable: dict[tuple, int] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._connect()) as db:
                db.executescript(_SCHEMA)
                db.execute("BEGIN IMMEDIATE")
                row = db.execute("SELECT target_epsilon, target_delta, unit FROM budget").fetchone()
                if row is None:
                    db.execute("INSERT INTO budget VALUES (?, ?, ?)", (target_epsilon, target_delta, unit))
                db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} can't be used as a privacy ledger ({error}). If another process holds it, wait for that "
                "one; if the file is damaged, restore it from a backup: without it nobody knows what was spent"
            ) from error
        if row is not None and row != (target_epsilon, target_delta, unit):
            raise UserError(
                f"{self.path} was opened for epsilon {row[0]:g}, delta {row[1]:g}, unit {row[2]}; now epsilon "
                f"{target_epsilon:g}, delta {target_delta:g}, unit {unit} is asked for: use the same budget, or "
                "another folder"
            )

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.execute("PRAGMA synchronous=FULL")
        return db

    def charges(self) -> list[Release]:
        with closing(self._connect()) as db:
            return _releases(db)

    def epsilon(self) -> float:
        """ε of everything ever charged, at the budget's δ."""
        return epsilon(self.charges(), self.target_delta)

    def expect(self, release: Release) -> None:
        """Work out once whether the budget allows a whole run, so that its charges needn't. Charges nothing."""
        others, mechanism, steps = _split(self.charges(), release)
        if epsilon([*others, Release(*mechanism, steps)], self.target_delta) <= self.target_epsilon:
            self._affordable[others, mechanism] = steps

    def charge(self, what: str, release: Release, *, repeatable: bool = False) -> None:
        """Write down a release before it is computed.

        Parameters
        ----------
        what
            Names the release, such as ``round 3``.
        repeatable
            The same name and mechanism stand for the same bytes (a seeded run, which isn't private anyway): charged
            once. Otherwise a name that comes again is another release, and charged again.

        Raises
        ------
        BudgetError
            It would exceed the budget; nothing is charged.
        UserError
            The charge can't be written (a full disk, another process that holds the file); nothing is charged.
        """
        try:
            self._charge(what, release, repeatable)
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} can't be charged ({error}), so nothing was computed: free space, or wait for the process "
                "that holds it, then start again"
            ) from error

    def _charge(self, what: str, release: Release, repeatable: bool) -> None:
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                names = (what, f"{what} (again %")
                again = db.execute("SELECT COUNT(*) FROM charges WHERE what = ? OR what LIKE ?", names).fetchone()[0]
                same = db.execute(
                    "SELECT COUNT(*) FROM charges WHERE (what = ? OR what LIKE ?) AND noise_multiplier = ? "
                    "AND sample_rate = ? AND steps = ?",
                    (*names, release.noise_multiplier, release.sample_rate, release.steps),
                ).fetchone()[0]
                if same and repeatable:
                    return
                spent = _releases(db)
                if not self._affords(spent, release):
                    now = epsilon([*spent, release], self.target_delta)
                    raise BudgetError(
                        f"{self.path.stem}: {what} would bring epsilon to {now:.3f}, over the budget of "
                        f"{self.target_epsilon:g} (delta {self.target_delta:g}; "
                        f"{epsilon(spent, self.target_delta):.3f} is spent). "
                        "The rounds done so far are in checkpoint.pt beside the ledger. To go "
                        "further, start a run with more noise or fewer steps"
                    )
                name = f"{what} (again {again})" if again else what
                db.execute(
                    "INSERT INTO charges (time, what, noise_multiplier, sample_rate, steps) VALUES (?, ?, ?, ?, ?)",
                    (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), name,
                     release.noise_multiplier, release.sample_rate, release.steps),
                )  # fmt: skip
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _affords(self, spent: list[Release], release: Release) -> bool:
        # ε grows with the steps and a PLD takes half a second: look ahead, and remember how far the budget reaches.
        others, mechanism, steps = _split(spent, release)
        if steps > self._affordable.get((others, mechanism), 0):
            self._affordable[others, mechanism] = self._most_steps(others, mechanism, steps)
        return steps <= self._affordable[others, mechanism]

    def _most_steps(self, others: tuple[Release, ...], mechanism: tuple[float, float], steps: int) -> int:
        """The largest number of steps up to 2 ``steps`` that the budget allows, by bisection."""

        def within(n: int) -> bool:
            return epsilon([*others, Release(*mechanism, n)], self.target_delta) <= self.target_epsilon

        if within(2 * steps):
            return 2 * steps
        low, high = 0, 2 * steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low


def charged_for(path: Path) -> list[str]:
    """What a ledger's file was charged for, in order."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        try:
            return [what for (what,) in db.execute("SELECT what FROM charges ORDER BY id")]
        except sqlite3.DatabaseError:
            return []  # cut off before it had a table, or damaged: nothing can be read from it


def _split(spent: list[Release], release: Release) -> tuple[tuple[Release, ...], tuple[float, float], int]:
    """What was released by other mechanisms; this mechanism; its steps with ``release`` added."""
    mechanism = (release.noise_multiplier, release.sample_rate)
    total = merge([*spent, release])
    others = tuple(r for r in total if (r.noise_multiplier, r.sample_rate) != mechanism)
    return others, mechanism, sum(r.steps for r in total if r not in others)


def _releases(db: sqlite3.Connection) -> list[Release]:
    return [Release(*row) for row in db.execute("SELECT noise_multiplier, sample_rate, steps FROM charges ORDER BY id")]
