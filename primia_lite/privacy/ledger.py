"""A hospital's own account of what it has released. A release is charged before it is computed, never after.

One SQLite file per hospital. A crash can charge a release that never left; it can't release one that wasn't charged.

What may still be released is decided in one of two ways, fixed when the file is made:

- by a *filter* (:mod:`primia_lite.privacy.accounting.rdp`): the releases' parameters may be chosen along the way, each
  after looking at what came before. The way of a ledger that lasts.
- by a *plan*: mechanisms and numbers of steps named before the first charge. The tight ε by PLD holds for it, but
  nothing outside it is allowed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, astuple
from functools import cached_property
from pathlib import Path

from primia_lite import __version__
from primia_lite.config import BudgetError, UserError, elsewhere
from primia_lite.privacy.accounting import Release, Releases, epsilon, merge
from primia_lite.privacy.accounting.rdp import FILTER_ORDERS, filter_epsilon, filter_order
from primia_lite.runtime import sync_folder

UNITS = ("patient", "film")
_APPLICATION, _FORMAT = 0x504C4467, 2  # SQLite's application_id and user_version: whose file it is, how it is laid out
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE budget (
    target_epsilon REAL NOT NULL, target_delta REAL NOT NULL, unit TEXT NOT NULL, filter_order INTEGER NOT NULL,
    plan TEXT NOT NULL, code TEXT NOT NULL
);
CREATE TABLE charges (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, what TEXT NOT NULL UNIQUE, mechanism TEXT NOT NULL,
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL, unit TEXT NOT NULL,
    code TEXT NOT NULL
);
"""
# Older ledgers say "add or remove one unit", and are counted alike.
MECHANISM = "Poisson-subsampled Gaussian, one unit zeroed out"
_AGAIN = re.compile(r"(.*) \(again ([0-9]{1,9})\)", re.DOTALL)


def check_budget(target_epsilon: float, target_delta: float | None, unit: str) -> None:
    """Raise UserError for a budget that can't be one."""
    if not 0 < target_epsilon < float("inf"):
        raise UserError(f"target_epsilon is {target_epsilon}: it must be above 0 and finite")
    if target_delta is None or not 0 < target_delta < 1:
        raise UserError(f"target_delta is {target_delta}: it must be in (0, 1), below 1 / number of patients")
    if unit not in UNITS:
        raise UserError(f"unit is {unit!r}: choose one of {', '.join(UNITS)}")


class Ledger:
    """Charges of one hospital against one budget (ε, δ) per unit.

    Parameters
    ----------
    path
        The file; made if it isn't there. Left as it is, and checked, if it is.
    target_epsilon, target_delta, unit
        The budget. All left out: an existing ledger is opened, whatever its budget.
    plan
        Releases that are fixed before the first charge; see the module's text. Left out, the filter decides.

    Raises
    ------
    UserError
        The file was made for another budget, plan or by other code, is damaged, locked or isn't a ledger; or there is
        none and no budget to make one; or the plan itself exceeds the budget.
    """

    def __init__(
        self,
        path: str | Path,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        unit: str = "patient",
        plan: Releases = (),
    ):
        self.path = Path(path)
        wanted = None
        if target_epsilon is not None:
            check_budget(target_epsilon, target_delta, unit)
            wanted = (target_epsilon, target_delta, unit, merge(plan))
        if not self.path.exists():
            if not wanted:
                raise UserError(f"there is no ledger {self.path}: to make one give target_epsilon and target_delta")
            self._make(*wanted)
        with self._database() as db:
            found, self.order = self._read(db)
        self.target_epsilon, self.target_delta, self.unit, self.plan = found
        if wanted and wanted != found:
            opened, asked = (
                f"epsilon {e:g}, delta {d:g}, unit {u}, plan {_words(releases)}"
                for e, d, u, releases in (found, wanted)
            )
            raise UserError(
                f"{self.path} was opened for {opened}; now {asked} is asked for. A plan counts only if it is made "
                "before the first charge: use the same budget and plan, or another folder"
            )

    @cached_property
    def by_plan(self) -> bool:
        """Whether the plan needs the tight ε. A matter of the plan alone, so it is settled before any data is seen."""
        return bool(self.plan) and self._filter(self.plan) > self.target_epsilon

    @contextmanager
    def _database(self, can_not: str = "be used as a privacy ledger") -> Iterator[sqlite3.Connection]:
        """The file, checked for damage; what goes wrong becomes a UserError, and what isn't committed is undone."""
        # Read and write, never create: a ledger that was deleted must not come back empty.
        existing = f"{self.path.absolute().as_uri()}?mode=rw"
        try:
            with closing(sqlite3.connect(existing, timeout=30, isolation_level=None, uri=True)) as db:
                db.execute("PRAGMA synchronous=EXTRA")  # FULL leaves a moment in which a power cut rolls a charge back
                damage = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if damage != "ok":
                    raise sqlite3.DatabaseError(damage.splitlines()[-1])
                yield db
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} can't {can_not} ({error}). If another process holds it, wait for that one; if the disk "
                "is full, free space; if the file is damaged or gone, restore it from a backup: without it nobody "
                "knows what was spent"
            ) from error

    def _read(self, db: sqlite3.Connection) -> tuple[tuple, int]:
        """The budget with its plan, and the filter's order."""
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            raise sqlite3.DatabaseError("the file is empty")
        (application,), (layout,) = (db.execute(f"PRAGMA {p}").fetchone() for p in ("application_id", "user_version"))
        if application != _APPLICATION and not {"budget", "charges"} <= tables:
            raise UserError(f"{self.path} is a database, but not a privacy ledger: name another file")
        if layout != _FORMAT:
            raise UserError(
                f"{self.path} was written by other code (ledger format {layout}; primia_lite {__version__} reads "
                f"{_FORMAT}): use the version that wrote it, or a new ledger, and count what the old one says as spent"
            )
        *budget, plan, order = db.execute(
            "SELECT target_epsilon, target_delta, unit, plan, filter_order FROM budget"
        ).fetchone()
        try:
            return (*budget, tuple(Release(**entry) for entry in json.loads(plan))), order
        except (TypeError, ValueError, UserError) as error:
            raise sqlite3.DatabaseError("its budget or plan can't be read") from error

    def _make(self, target_epsilon: float, target_delta: float, unit: str, plan: tuple[Release, ...]) -> None:
        """Write the file elsewhere and link it into place: it is there whole or not at all, and made once."""
        if plan and (cost := epsilon(plan, target_delta)) > target_epsilon:
            raise BudgetError(
                f"the plan {_words(plan)} costs epsilon {cost:.3f}, more than the budget of {target_epsilon:g}: plan "
                "more noise or fewer steps"
            )
        order = filter_order(target_epsilon, target_delta, plan)
        if not plan and filter_epsilon(Release(1e12, 1.0, 1), target_delta, order) >= target_epsilon:
            raise UserError(
                f"target_epsilon is {target_epsilon:g}: at delta {target_delta:g} a filter of order up to "
                f"{FILTER_ORDERS[-1]} could release nothing. Take a larger epsilon, or a plan"
            )
        draft = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        budget = (target_epsilon, target_delta, unit, order, json.dumps([asdict(r) for r in plan]), __version__)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(draft, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous=EXTRA")
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO budget VALUES (?, ?, ?, ?, ?, ?)", budget)
            os.link(draft, self.path)
            sync_folder(self.path.parent)
        except (sqlite3.Error, OSError) as error:
            if not self.path.exists():  # or another process was faster: its ledger counts
                raise UserError(
                    f"{self.path} can't be made ({error}): free space, or {elsewhere(self.path)}"
                ) from error
        finally:
            with suppress(OSError):
                draft.unlink()

    def charges(self) -> list[Release]:
        """All that was charged, in order."""
        with self._database() as db:
            return [release for _, release in _charges(db)]

    def _filter(self, releases: Releases) -> float:
        return filter_epsilon(releases, self.target_delta, self.order)

    def _counted(self, releases: Releases) -> float:
        return epsilon(releases, self.target_delta) if self.by_plan else self._filter(releases)

    def epsilon(self) -> float:
        """ε used so far, at the budget's δ: by PLD under a plan, by the filter otherwise. What is guaranteed is the
        budget, also where releases are chosen or stopped after looking at others."""
        return self._counted(self.charges())

    def spent(self) -> dict:
        """How much is used so far: ``epsilon``, as by :meth:`epsilon`; ``filter``, valid for parameters chosen along
        the way; ``pld``, valid if they were fixed in advance; and the budget with the ``rule`` that decides."""
        charges = self.charges()
        return {
            "epsilon": self._counted(charges), "filter": self._filter(charges),
            "pld": epsilon(charges, self.target_delta), "budget": self.target_epsilon, "delta": self.target_delta,
            "unit": self.unit, "order": self.order, "rule": "plan" if self.by_plan else "filter",
        }  # fmt: skip

    def statement(self) -> list[dict]:
        """Every charge with its time, mechanism, σ, q, steps, unit, code version, and the filter's ε up to it."""
        with self._database() as db:
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute("SELECT * FROM charges ORDER BY id")]
        so_far: tuple[Release, ...] = ()
        for row in rows:
            so_far = merge([*so_far, Release(row["noise_multiplier"], row["sample_rate"], row["steps"])])
            row["filter_epsilon"] = self._filter(so_far)
        return rows

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
            The charge can't be written; nothing is charged.
        """
        what = what.encode(errors="backslashreplace").decode()  # a folder's name may have no UTF-8
        with self._database("be charged, so nothing was computed") as db:
            db.execute("BEGIN IMMEDIATE")  # one process at a time reads what is spent and adds to it
            charged = _charges(db)
            before = {number: old for (name, number), old in charged if name == what}
            if repeatable and release in before.values():
                return
            self._allow(what, [old for _, old in charged], release)
            if (again := max(before, default=-1) + 1) or _AGAIN.fullmatch(what):
                what = f"{what} (again {again})"
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            row = (None, now, what, MECHANISM, *astuple(release), self.unit, __version__)
            db.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("COMMIT")

    def affords(self, release: Release) -> bool:
        """Whether a release could be charged now. Charges nothing."""
        try:
            self._allow("", self.charges(), release)
        except BudgetError:
            return False
        return True

    def _allow(self, what: str, spent: list[Release], release: Release) -> None:
        after = [*spent, release]
        planned = {(r.noise_multiplier, r.sample_rate): r.steps for r in self.plan}
        # What the plan allows it allows by either rule: the filter's ε of a part is at most that of the whole. So the
        # accountant, slow to import, is asked only about what lies outside.
        if all(r.steps <= planned.get((r.noise_multiplier, r.sample_rate), 0) for r in merge(after)):
            return
        total = self._counted(after)
        if total > self.target_epsilon:
            why = f"{what} would bring epsilon to {total:.3f}, over the budget of {self.target_epsilon:g}"
        elif self.by_plan:
            why = f"its plan ({_words(self.plan)}) allows nothing else"
        else:
            return
        rule = "PLD" if self.by_plan else f"an RDP filter of order {self.order}"
        raise BudgetError(
            f"{self.path.stem}: {why} (delta {self.target_delta:g}, unit {self.unit}, by {rule}; "
            f"{self._counted(spent):.3f} is spent). Nothing was computed. Ask for more noise or fewer steps; what a "
            "run has reached is in checkpoint.pt of its folder"
        )


def charged_for(path: Path) -> list[str]:
    """What a ledger's file of any format was charged for, in order; raises UserError if it can't be read."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", timeout=5, uri=True)) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'charges'").fetchone():
                return []
            return [what for (what,) in db.execute("SELECT what FROM charges ORDER BY id")]
    except sqlite3.Error as error:
        raise UserError(
            f"{path} can't be read ({error}), so it isn't deleted: wait for the process that holds it; that of a mere "
            "simulation you may delete by hand"
        ) from error


def _charges(db: sqlite3.Connection) -> list[tuple[tuple[str, int], Release]]:
    """What was charged, in order: its name and how often that came before, and the release. No two names are written
    alike, whatever they end with."""
    charged = []
    for what, *release in db.execute("SELECT what, noise_multiplier, sample_rate, steps FROM charges ORDER BY id"):
        again = _AGAIN.fullmatch(what)
        charged.append(((again[1], int(again[2])) if again else (what, 0), Release(*release)))
    return charged


def _words(plan: tuple[Release, ...]) -> str:
    parts = [f"{r.steps} steps of sigma {r.noise_multiplier:g} at rate {r.sample_rate:g}" for r in plan]
    return " + ".join(parts) or "none"
