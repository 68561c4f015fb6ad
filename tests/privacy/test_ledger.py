"""The ledger charges before, refuses overspending, and survives kills and crowds."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest

from primia_lite import __version__
from primia_lite.config import BudgetError, UserError
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon
from primia_lite.privacy.accounting.rdp import filter_epsilon
from primia_lite.privacy.ledger import Ledger, charged_for

STEP = Release(1.0, 0.25, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.sqlite"


def execute(path, *statements):
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


@contextmanager
def held(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield
        holder.execute("ROLLBACK")


def test_charges_add_up_until_the_budget_is_spent(path):
    ledger = Ledger(path, 4.0, 1e-4)
    paid = 0
    with pytest.raises(BudgetError, match="budget"):
        for paid in range(1000):
            ledger.charge(f"round {paid}", STEP)
    assert len(ledger.charges()) == paid and not ledger.affords(STEP)
    assert ledger.epsilon() == filter_epsilon(ledger.charges(), 1e-4, ledger.order) <= 4.0
    assert filter_epsilon([*ledger.charges(), STEP], 1e-4, ledger.order) > 4.0
    assert epsilon(ledger.charges(), 1e-4) < ledger.epsilon()  # what it would be, had all been fixed in advance
    assert Ledger(path, 4.0, 1e-4).charges() == ledger.charges()


def test_a_name_that_comes_again_is_charged_again_unless_repeatable(path):
    ledger = Ledger(path, 50.0, 1e-4)
    for _ in range(3):
        ledger.charge("round 1", STEP)
    assert len(ledger.charges()) == 3
    for _ in range(3):
        ledger.charge("round 2", STEP, repeatable=True)
    assert len(ledger.charges()) == 4
    ledger.charge("round 2", Release(2.0, 0.25, 2), repeatable=True)  # another mechanism is another release
    assert len(ledger.charges()) == 5


@pytest.mark.parametrize(
    ("charged", "asked"),
    [
        ("runX1", "run_1"), ("run 1", "run%"), ("run 1", "RUN 1"), ("é", "e\u0301"), ("run", "ru'n"), ("run", "run\\"),
        ("run 1", "run 1 "), ("run", "run (again 1)"), ("run (again 1)", "run"), ("run (again 1)", "run (again 2)"),
        ("a" * 5000, "a" * 5001), ("run (again 1): round 1", "run: round 1"), ("run (again 1", "run"), ("", "run"),
        ("run\n (again 1)", "run\n"), ("run\0a", "run\0b"),
    ],
)  # fmt: skip
def test_another_name_is_another_release(path, charged, asked):
    ledger = Ledger(path, 500.0, 1e-4)
    ledger.charge(charged, STEP)
    ledger.charge(charged, STEP)
    for _ in range(2):
        ledger.charge(asked, STEP, repeatable=True)
    assert len(ledger.charges()) == 3
    ledger.charge(charged, STEP, repeatable=True)
    assert len(ledger.charges()) == 3 == len(set(charged_for(path)))


def test_a_name_without_utf8_and_numpys_numbers_are_charged(path):
    ledger = Ledger(path, 500.0, 1e-4, plan=Release(np.float64(1.0), 0.25, np.int64(2)))
    for _ in range(2):
        release = Release(np.float32(1.0), 0.25, np.int64(2))
        ledger.charge(b"M\xfcnchen".decode(errors="surrogateescape"), release, repeatable=True)
    assert Ledger(path).plan == (STEP,) == tuple(ledger.charges()) and "nchen" in charged_for(path)[0]


def test_a_ledger_that_says_add_or_remove_is_read_and_counted_on(path):
    """As older ones do: their mechanism is a word for the same accounting."""
    ledger = Ledger(path, 500.0, 1e-4)
    ledger.charge("round 1", STEP)
    spent = ledger.spent()
    execute(path, "UPDATE charges SET mechanism = 'Poisson-subsampled Gaussian, add or remove one unit'")
    again = Ledger(path, 500.0, 1e-4)
    assert again.spent() == spent
    again.charge("round 1", STEP, repeatable=True)
    again.charge("round 2", STEP)
    mechanisms = [row["mechanism"].rpartition(", ")[2] for row in again.statement()]
    assert mechanisms == ["add or remove one unit", "one unit zeroed out"]


def test_a_ledger_of_many_mechanisms_is_counted_once_and_the_same_whatever_the_order_of_looks(path):
    releases = [Release(30.0 + n % 7 + n / 60, 0.25, 1) for n in range(60)]
    alone = epsilon(releases, 1e-4)  # imports, and counts
    ledger = Ledger(path, 8.0, 1e-4)
    begin = time.process_time()
    for number, release in enumerate(releases):
        ledger.charge(f"look {number}", release)
        if number % 6 == 5:
            ledger.spent()
    took = time.process_time() - begin
    assert ledger.spent()["pld"] == alone == Ledger(path).spent()["pld"] and len(ledger.statement()) == 60
    assert took < 30  # CPU seconds; counted anew at every look it was above 60


# --- several processes ------------------------------------------------------------------------------------------------


def start(code: str, *arguments) -> subprocess.Popen:
    imports = """
    import sys
    from primia_lite.config import BudgetError, UserError
    from primia_lite.privacy.accounting import Release
    from primia_lite.privacy.ledger import Ledger
    """
    command = [sys.executable, "-c", textwrap.dedent(imports) + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_what_was_confirmed_before_a_kill_is_charged(path):
    code = """
    ledger = Ledger(sys.argv[1], 1000.0, 1e-4)
    for i in range(10_000):
        ledger.charge(f"round {i}", Release(20.0, 0.01, 1))
        print(i, flush=True)
    """
    process = start(code, path)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    # Not communicate(): it reads past the lines that readline() has taken into its buffer already.
    confirmed = 1 + len(process.stdout.read().split())
    process.wait()
    assert len(Ledger(path, 1000.0, 1e-4).charges()) in (confirmed, confirmed + 1)


def test_two_processes_at_once_lose_no_charge_and_never_overspend_together(path):
    """Each alone would stay within the budget for long; together they stop where one of them would."""
    code = """
    ledger = Ledger(sys.argv[1], 1.0, 1e-4)
    for i in range(200):
        try:
            ledger.charge(f"{sys.argv[2]} {i}", Release(20.0, 1.0, 1))
        except BudgetError:
            print("refused", i, flush=True)
            break
        print("released", i, flush=True)
    """
    said = [racer.communicate(timeout=600)[0].splitlines() for racer in [start(code, path, name) for name in "xy"]]
    assert all(lines[-1].startswith("refused") for lines in said)
    charges, order = Ledger(path).charges(), Ledger(path).order
    assert len(charges) == sum(line.startswith("released") for lines in said for line in lines)
    assert filter_epsilon(charges, 1e-4, order) <= 1.0 < filter_epsilon([*charges, charges[0]], 1e-4, order)


def test_two_processes_make_one_ledger_and_the_other_budget_is_refused(path):
    code = """
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print("made", Ledger(sys.argv[1], float(sys.argv[2]), 1e-4).target_epsilon)
    except UserError as error:
        print("refused", error)
    """
    makers = [start(code, path, budget) for budget in (2, 3)]
    assert all(maker.stdout.readline() == "ready\n" for maker in makers)
    said = [maker.communicate("go\n", timeout=600)[0] for maker in makers]
    assert sorted(line.split()[0] for line in said) == ["made", "refused"]
    assert [p.name for p in path.parent.iterdir()] == ["a.sqlite"]


def test_a_ledger_that_another_process_holds_is_named(path, monkeypatch):
    ledger, connect = Ledger(path, 50.0, 1e-4), sqlite3.connect
    ledger.charge("round 1", STEP)
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0.1}))
    reading = (ledger.charges, ledger.epsilon, ledger.spent, ledger.statement, lambda: ledger.affords(STEP))
    with held(path):
        for use in (*reading, lambda: Ledger(path, 50.0, 1e-4), lambda: ledger.charge("round 2", STEP)):
            with pytest.raises(UserError, match="locked"):
                use()
        with pytest.raises(UserError, match="deleted"):  # what can't be read is not said to be uncharged
            charged_for(path)
    ledger.charge("round 2", STEP)
    assert charged_for(path) == ["round 1", "round 2"]


def test_a_full_disk_is_named_and_nothing_is_charged(path, monkeypatch):
    ledger, connect = Ledger(path, 50.0, 1e-4), sqlite3.connect

    def full(*args, **options):
        db = connect(*args, **options)
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        return db

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(UserError, match="full"):
        for number in range(500):
            ledger.charge(f"round {number} " + "x" * 200, Release(50.0, 0.01, 1), repeatable=True)
    monkeypatch.undo()
    assert len(ledger.charges()) == number


# --- filter and plan --------------------------------------------------------------------------------------------------


def test_parameters_chosen_along_the_way_are_counted_by_the_filter(path):
    """An analyst who doubles the noise whenever refused still ends within the budget."""
    ledger, sigma, refused = Ledger(path, 2.0, 1e-4), 1.0, 0
    for number in range(60):
        try:
            ledger.charge(f"query {number}", Release(sigma, 0.5, 1))
        except BudgetError:
            sigma, refused = 2 * sigma, refused + 1
    spent = ledger.spent()
    assert refused >= 2 and len({r.noise_multiplier for r in ledger.charges()}) >= 2
    assert spent["pld"] < spent["filter"] == spent["epsilon"] <= 2.0 and spent["rule"] == "filter"


def test_a_plan_is_counted_tightly_and_allows_nothing_else(tmp_path):
    sigma = calibrate_noise_multiplier(3.0, 1e-4, 0.5, 10)
    plan = Release(sigma, 0.5, 10)
    ledger = Ledger(tmp_path / "a.sqlite", 3.0, 1e-4, plan=plan)
    assert ledger.by_plan and filter_epsilon(plan, 1e-4, ledger.order) > 3.0
    for number in range(10):
        ledger.charge(f"round {number}", Release(sigma, 0.5, 1))
    assert ledger.epsilon() == epsilon(plan, 1e-4) <= 3.0
    with pytest.raises(BudgetError, match="budget"):
        ledger.charge("round 10", Release(sigma, 0.5, 1))
    other = Ledger(tmp_path / "b.sqlite", 3.0, 1e-4, plan=plan)
    with pytest.raises(BudgetError, match="plan"):
        other.charge("a look", Release(1000.0, 1.0, 1))


def test_a_plan_that_the_filter_can_afford_leaves_room_for_more(path):
    ledger = Ledger(path, 8.0, 1e-4, plan=Release(3.0, 0.25, 10))
    assert not ledger.by_plan
    ledger.charge("round 1", Release(3.0, 0.25, 10))
    # What is released next may depend on this: only the filter holds then.
    assert ledger.epsilon() == ledger.spent()["filter"] > ledger.spent()["pld"]
    ledger.charge("something else", Release(5.0, 1.0, 1))
    assert ledger.epsilon() == ledger.spent()["filter"]


def test_a_plan_is_made_before_the_first_charge_or_not_at_all(tmp_path):
    plan = Release(3.0, 0.25, 10)
    Ledger(tmp_path / "a.sqlite", 8.0, 1e-4).charge("round 1", STEP)
    with pytest.raises(UserError, match="plan"):
        Ledger(tmp_path / "a.sqlite", 8.0, 1e-4, plan=plan)
    with pytest.raises(BudgetError, match="plan"):
        Ledger(tmp_path / "c.sqlite", 0.1, 1e-4, plan=plan)
    assert not Ledger(tmp_path / "c.sqlite", 8.0, 1e-4, plan=plan).charges()


# --- what is written, and by whom -------------------------------------------------------------------------------------


def test_the_statement_names_time_mechanism_noise_rate_steps_unit_and_code(path):
    ledger = Ledger(path, 50.0, 1e-4, "film")
    ledger.charge("round 1", STEP)
    ledger.charge("round 2", STEP)
    first, second = ledger.statement()
    assert first["mechanism"].startswith("Poisson-subsampled Gaussian") and first["unit"] == "film"
    assert (first["noise_multiplier"], first["sample_rate"], first["steps"]) == (1.0, 0.25, 2)
    assert first["code"] == __version__ and first["time"].endswith("Z")
    assert 0 < first["filter_epsilon"] < second["filter_epsilon"] == ledger.epsilon()
    again = Ledger(path)  # opens without its budget
    assert (again.target_epsilon, again.target_delta, again.unit) == (50.0, 1e-4, "film")


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ((0.0, 1e-4), "target_epsilon"),
        ((float("inf"), 1e-4), "target_epsilon"),
        ((0.0001, 1e-4), "nothing"),  # too small to release anything
        ((1.0, None), "target_delta"),
        ((1.0, 1.0), "target_delta"),
        ((1.0, 1e-4, "child"), "unit"),
        ((), "no ledger"),
    ],
)
def test_bad_budgets_are_named(path, budget, word):
    with pytest.raises(UserError, match=word):
        Ledger(path, *budget)
    Ledger(path, 0.01, 1e-4).charge("one look", Release(10_000.0, 1.0, 1))
    with pytest.raises(UserError, match="budget"):
        Ledger(path, 9.0, 1e-4)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statements", "word"),
    [
        (["CREATE TABLE orders (id INTEGER)"], "not a privacy ledger"),
        (["CREATE TABLE budget (x)", "CREATE TABLE charges (x)"], "format 0"),
        (["CREATE TABLE budget (x)", f"PRAGMA application_id = {0x504C4467}", "PRAGMA user_version = 99"], "format 99"),
    ],
)
def test_other_databases_and_other_code_are_refused(path, statements, word):
    execute(path, *statements)
    with pytest.raises(UserError, match=word):
        Ledger(path, 8.0, 1e-4)


def test_a_file_that_is_no_database_is_refused(path):
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="used"):
        Ledger(path, 8.0, 1e-4)
    path.with_name("folder").mkdir()
    for name in ("a.sqlite", "folder"):
        with pytest.raises(UserError, match="deleted"):
            charged_for(path.with_name(name))


def test_a_file_that_was_cut_to_nothing_is_not_a_new_ledger(path):
    Ledger(path, 50.0, 1e-4).charge("round 1", STEP)
    os.truncate(path, 0)
    for budget in ((50.0, 1e-4), ()):
        with pytest.raises(UserError, match="empty"):
            Ledger(path, *budget)


def test_a_ledger_that_was_deleted_does_not_come_back_empty(path):
    ledger = Ledger(path, 50.0, 1e-4)
    ledger.charge("round 1", STEP)
    path.unlink()
    with pytest.raises(UserError, match="gone"):
        ledger.charge("round 2", STEP)
    assert not path.exists()


@pytest.mark.parametrize("damage", ["cell count", "zeroed page", "plan"])
def test_a_partly_damaged_ledger_is_refused(path, damage):
    """A flipped count of cells in a leaf hides charges, and SQLite alone doesn't mind."""
    ledger = Ledger(path, 1000.0, 1e-4)
    for number in range(200):
        ledger.charge(f"round {number}", Release(20.0, 0.01, 1))
    if damage == "plan":
        execute(path, "UPDATE budget SET plan = 'no plan'")
    else:
        content, page = bytearray(path.read_bytes()), 4096
        leaf = next(n for n in range(2, len(content) // page) if content[n * page] == 13 and content[n * page + 4] > 20)
        if damage == "cell count":
            content[leaf * page + 4] -= 10
        else:
            content[leaf * page : (leaf + 1) * page] = bytes(page)
        path.write_bytes(content)
    with pytest.raises(UserError, match="backup"):
        Ledger(path, 1000.0, 1e-4)
    if damage != "plan":
        with pytest.raises(UserError, match="computed"):
            ledger.charge("round 200", Release(20.0, 0.01, 1))
