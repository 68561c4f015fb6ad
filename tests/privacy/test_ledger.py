"""The ledger charges before, refuses overspending, and survives kills and crowds."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from primia_lite.config import BudgetError, UserError
from primia_lite.privacy.accounting import Release, calibrate_noise_multiplier, epsilon, filter_epsilon
from primia_lite.privacy.ledger import Ledger, charged_for

STEP = Release(1.0, 0.25, 2)


def test_charges_add_up_until_the_budget_is_spent(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 4.0, 1e-4)
    paid = 0
    with pytest.raises(BudgetError, match=r"a: round \d+ would bring epsilon to .* over the budget of 4"):
        for paid in range(1000):
            ledger.charge(f"round {paid}", STEP)
    assert len(ledger.charges()) == paid
    assert ledger.epsilon() == filter_epsilon(ledger.charges(), 1e-4, ledger.order) <= 4.0
    assert filter_epsilon([*ledger.charges(), STEP], 1e-4, ledger.order) > 4.0
    assert epsilon(ledger.charges(), 1e-4) < ledger.epsilon()  # what it would be, had all been fixed in advance


def test_a_name_that_comes_again_is_charged_again_unless_repeatable(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)
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
def test_another_name_is_another_release(tmp_path, charged, asked):
    ledger = Ledger(tmp_path / "a.sqlite", 500.0, 1e-4)
    ledger.charge(charged, STEP)
    ledger.charge(charged, STEP)
    for _ in range(2):
        ledger.charge(asked, STEP, repeatable=True)
    assert len(ledger.charges()) == 3
    ledger.charge(charged, STEP, repeatable=True)
    assert len(ledger.charges()) == 3 == len(set(charged_for(ledger.path)))


def test_a_name_without_utf8_is_charged(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 500.0, 1e-4)
    for _ in range(2):
        ledger.charge(b"M\xfcnchen".decode(errors="surrogateescape"), STEP, repeatable=True)
    assert ledger.charges() == [STEP] and "nchen" in charged_for(ledger.path)[0]


def test_numpys_numbers_are_charged_as_plain_ones(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 500.0, 1e-4, plan=Release(np.float64(1.0), 0.25, np.int64(2)))
    ledger.charge("round 1", Release(np.float32(1.0), 0.25, np.int64(2)))
    assert Ledger(tmp_path / "a.sqlite").plan == (STEP,) == tuple(ledger.charges())


def test_a_ledger_that_says_add_or_remove_is_read_and_counted_on(tmp_path):
    """As older ones do: their mechanism is a word for the same accounting."""
    import sqlite3

    ledger = Ledger(tmp_path / "a.sqlite", 500.0, 1e-4)
    ledger.charge("round 1", STEP)
    spent = ledger.spent()
    with sqlite3.connect(ledger.path) as db:
        db.execute("UPDATE charges SET mechanism = 'Poisson-subsampled Gaussian, add or remove one unit'")
    db.close()
    again = Ledger(tmp_path / "a.sqlite", 500.0, 1e-4)
    assert again.spent() == spent
    again.charge("round 1", STEP, repeatable=True)
    again.charge("round 2", STEP)
    assert [row["mechanism"].rpartition(", ")[2] for row in again.statement()] == [
        "add or remove one unit", "one unit zeroed out",
    ]  # fmt: skip


def test_a_ledger_of_many_mechanisms_is_counted_once_and_the_same_whatever_the_order_of_looks(tmp_path):
    releases = [Release(30.0 + n % 7 + n / 60, 0.25, 1) for n in range(60)]
    alone = epsilon(releases, 1e-4)  # imports, and counts
    ledger = Ledger(tmp_path / "a.sqlite", 8.0, 1e-4)
    begin = time.process_time()
    for number, release in enumerate(releases):
        ledger.charge(f"look {number}", release)
        if number % 6 == 5:
            ledger.spent()
    took = time.process_time() - begin
    assert ledger.spent()["pld"] == alone and Ledger(ledger.path).spent()["pld"] == alone
    assert len(ledger.statement()) == 60
    assert took < 30  # CPU seconds; counted anew at every look it was above 60


def test_charges_outlive_the_process(tmp_path):
    Ledger(tmp_path / "a.sqlite", 50.0, 1e-4).charge("round 1", STEP)
    assert Ledger(tmp_path / "a.sqlite", 50.0, 1e-4).charges() == [STEP]


def test_another_budget_or_a_damaged_file_is_refused(tmp_path):
    Ledger(tmp_path / "a.sqlite", 8.0, 1e-4)
    with pytest.raises(UserError, match="opened for epsilon 8.*epsilon 9"):
        Ledger(tmp_path / "a.sqlite", 9.0, 1e-4)
    (tmp_path / "b.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="can't be used as a privacy ledger"):
        Ledger(tmp_path / "b.sqlite", 8.0, 1e-4)


CHARGER = textwrap.dedent(
    """
    import sys
    from primia_lite.privacy.accounting import Release
    from primia_lite.privacy.ledger import Ledger
    ledger = Ledger(sys.argv[1], 1000.0, 1e-4)
    print("ready", flush=True)
    for i in range(int(sys.argv[3])):
        ledger.charge(f"{sys.argv[2]} {i}", Release(20.0, 0.01, 1))
        print(i, flush=True)
    """
)


def charger(path, name, count):
    command = [sys.executable, "-c", CHARGER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_lose_no_charge(tmp_path):
    path = tmp_path / "a.sqlite"
    processes = [charger(path, name, 15) for name in ("x", "y")]
    assert [p.wait(timeout=600) for p in processes] == [0, 0]
    for p in processes:
        p.stdout.close()
    assert sum(r.steps for r in Ledger(path, 1000.0, 1e-4).charges()) == 30


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_what_was_confirmed_before_a_kill_is_charged(tmp_path):
    path = tmp_path / "a.sqlite"
    process = charger(path, "x", 10_000)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    confirmed = len(process.stdout.read().split())
    process.wait()
    process.stdout.close()
    assert confirmed > 0
    assert len(Ledger(path, 1000.0, 1e-4).charges()) in (confirmed, confirmed + 1)


def test_a_full_disk_is_named_and_nothing_is_charged(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)
    connect = Ledger._connect

    def full(self):
        db = connect(self)
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        return db

    monkeypatch.setattr(Ledger, "_connect", full)
    with pytest.raises(UserError, match="a.sqlite can't be charged, so nothing was computed .*full.*free space"):
        for number in range(500):
            ledger.charge(f"round {number} " + "x" * 200, Release(50.0, 0.01, 1), repeatable=True)
    monkeypatch.setattr(Ledger, "_connect", connect)
    assert len(ledger.charges()) == number


# --- filter and plan --------------------------------------------------------------------------------------------------


def test_parameters_chosen_along_the_way_are_counted_by_the_filter(tmp_path):
    """An analyst who doubles the noise whenever refused still ends within the budget."""
    ledger, sigma, refused = Ledger(tmp_path / "a.sqlite", 2.0, 1e-4), 1.0, 0
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
    with pytest.raises(BudgetError, match="round 10 would bring epsilon to .* over the budget of 3 .*by PLD"):
        ledger.charge("round 10", Release(sigma, 0.5, 1))
    other = Ledger(tmp_path / "b.sqlite", 3.0, 1e-4, plan=plan)
    with pytest.raises(BudgetError, match="its plan .10 steps of sigma .* allows nothing else"):
        other.charge("a look", Release(1000.0, 1.0, 1))


def test_a_plan_that_the_filter_can_afford_leaves_room_for_more(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 8.0, 1e-4, plan=Release(3.0, 0.25, 10))
    assert not ledger.by_plan
    ledger.charge("round 1", Release(3.0, 0.25, 10))
    # What is released next may depend on this: only the filter holds then.
    assert ledger.epsilon() == ledger.spent()["filter"] > ledger.spent()["pld"]
    ledger.charge("something else", Release(5.0, 1.0, 1))
    assert ledger.epsilon() == ledger.spent()["filter"]


def test_a_plan_is_made_before_the_first_charge_or_not_at_all(tmp_path):
    plan = Release(3.0, 0.25, 10)
    Ledger(tmp_path / "a.sqlite", 8.0, 1e-4).charge("round 1", STEP)
    with pytest.raises(UserError, match="opened for the plan none; now 10 steps of sigma 3"):
        Ledger(tmp_path / "a.sqlite", 8.0, 1e-4, plan=plan)
    with pytest.raises(BudgetError, match="the plan .* costs epsilon .*, more than the budget of 0.1"):
        Ledger(tmp_path / "c.sqlite", 0.1, 1e-4, plan=plan)
    assert not Ledger(tmp_path / "c.sqlite", 8.0, 1e-4, plan=plan).charges()


# --- what is written, and by whom -------------------------------------------------------------------------------------


def test_the_statement_names_time_mechanism_noise_rate_steps_unit_and_code(tmp_path):
    from primia_lite import __version__

    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4, "film")
    ledger.charge("round 1", STEP)
    ledger.charge("round 2", STEP)
    first, second = ledger.statement()
    assert first["mechanism"].startswith("Poisson-subsampled Gaussian") and first["unit"] == "film"
    assert (first["noise_multiplier"], first["sample_rate"], first["steps"]) == (1.0, 0.25, 2)
    assert first["code"] == __version__ and first["time"].endswith("Z")
    assert 0 < first["filter_epsilon"] < second["filter_epsilon"] == ledger.epsilon()


def test_an_existing_ledger_opens_without_its_budget(tmp_path):
    Ledger(tmp_path / "a.sqlite", 2.0, 1e-5, "film").charge("round 1", Release(9.0, 0.25, 1))
    again = Ledger(tmp_path / "a.sqlite")
    assert (again.target_epsilon, again.target_delta, again.unit) == (2.0, 1e-5, "film") and again.epsilon() > 0
    with pytest.raises(UserError, match="there is no ledger"):
        Ledger(tmp_path / "nowhere.sqlite")


def test_other_databases_and_other_code_are_refused(tmp_path):
    import sqlite3

    for name, statements in {
        "shop": ["CREATE TABLE orders (id INTEGER)"],
        "older": ["CREATE TABLE budget (x)", "CREATE TABLE charges (x)"],
        "newer": ["CREATE TABLE budget (x)", f"PRAGMA application_id = {0x504C4467}", "PRAGMA user_version = 99"],
    }.items():
        with sqlite3.connect(tmp_path / f"{name}.sqlite") as db:
            for statement in statements:
                db.execute(statement)
        db.close()
    with pytest.raises(UserError, match="is a database, but not a privacy ledger"):
        Ledger(tmp_path / "shop.sqlite", 8.0, 1e-4)
    for name, layout in (("older", 0), ("newer", 99)):
        with pytest.raises(UserError, match=f"written by other code .ledger format {layout};"):
            Ledger(tmp_path / f"{name}.sqlite", 8.0, 1e-4)


def test_a_ledger_that_another_process_holds_is_named(tmp_path, monkeypatch):
    import sqlite3

    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)
    holder = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(Ledger, "_connect", lambda self: sqlite3.connect(self.path, timeout=0.1, isolation_level=None))
    with pytest.raises(UserError, match="can't be charged, so nothing was computed .database is locked"):
        ledger.charge("round 1", STEP)
    reading = (ledger.charges, ledger.epsilon, ledger.spent, ledger.statement, lambda: ledger.affords(STEP))
    for read in (*reading, lambda: Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)):
        with pytest.raises(UserError, match="database is locked.*wait for that one"):
            read()
    holder.execute("ROLLBACK")
    holder.close()
    ledger.charge("round 1", STEP)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ((0.0, 1e-4), "target_epsilon is 0"),
        ((float("inf"), 1e-4), "target_epsilon is inf"),
        ((1.0, None), "target_delta is None"),
        ((1.0, 1.0), "target_delta is 1"),
        ((1.0, 1e-4, "child"), "unit is 'child'"),
    ],
)
def test_bad_budgets_are_named(tmp_path, budget, message):
    with pytest.raises(UserError, match=message):
        Ledger(tmp_path / "a.sqlite", *budget)


RACER = textwrap.dedent(
    """
    import sys
    from primia_lite.config import BudgetError
    from primia_lite.privacy.accounting import Release
    from primia_lite.privacy.ledger import Ledger
    ledger = Ledger(sys.argv[1], 1.0, 1e-4)
    for i in range(200):
        try:
            ledger.charge(f"{sys.argv[2]} {i}", Release(20.0, 1.0, 1))
        except BudgetError:
            print("refused", i, flush=True)
            break
        print("released", i, flush=True)
    """
)


def test_two_processes_at_once_never_overspend_together(tmp_path):
    """Each alone would stay within the budget for long; together they stop where one of them would."""
    path = tmp_path / "a.sqlite"
    command = [sys.executable, "-c", RACER, str(path)]
    racers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("x", "y")]
    said = [racer.communicate(timeout=600)[0].splitlines() for racer in racers]
    assert all(lines[-1].startswith("refused") for lines in said)
    charges = Ledger(path).charges()
    assert len(charges) == sum(line.startswith("released") for lines in said for line in lines)
    order = Ledger(path).order
    assert filter_epsilon(charges, 1e-4, order) <= 1.0 < filter_epsilon([*charges, charges[0]], 1e-4, order)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_to_nothing_is_not_a_new_ledger(tmp_path):
    Ledger(tmp_path / "a.sqlite", 50.0, 1e-4).charge("round 1", STEP)
    os.truncate(tmp_path / "a.sqlite", 0)
    for budget in ((50.0, 1e-4), ()):
        with pytest.raises(UserError, match="the file is empty.*restore it from a backup"):
            Ledger(tmp_path / "a.sqlite", *budget)


def test_a_ledger_that_was_deleted_does_not_come_back_empty(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)
    ledger.charge("round 1", STEP)
    ledger.path.unlink()
    with pytest.raises(UserError, match="can't be charged, so nothing was computed .*damaged or gone"):
        ledger.charge("round 2", STEP)
    assert not ledger.path.exists()


@pytest.mark.parametrize("damage", ["cell count", "zeroed page", "plan"])
def test_a_partly_damaged_ledger_is_refused(tmp_path, damage):
    """A flipped count of cells in a leaf hides charges, and SQLite alone doesn't mind."""
    import sqlite3

    path = tmp_path / "a.sqlite"
    ledger = Ledger(path, 1000.0, 1e-4)
    for number in range(200):
        ledger.charge(f"round {number}", Release(20.0, 0.01, 1))
    if damage == "plan":
        with sqlite3.connect(path) as db:
            db.execute("UPDATE budget SET plan = 'no plan'")
        db.close()
    else:
        content, page = bytearray(path.read_bytes()), 4096
        leaf = next(n for n in range(2, len(content) // page) if content[n * page] == 13 and content[n * page + 4] > 20)
        if damage == "cell count":
            content[leaf * page + 4] -= 10
        else:
            content[leaf * page : (leaf + 1) * page] = bytes(page)
        path.write_bytes(content)
    with pytest.raises(UserError, match="can't be used as a privacy ledger.*restore it from a backup"):
        Ledger(path, 1000.0, 1e-4)
    if damage != "plan":
        with pytest.raises(UserError, match="can't be charged, so nothing was computed"):
            ledger.charge("round 200", Release(20.0, 0.01, 1))


def test_what_cannot_be_read_is_not_said_to_be_uncharged(tmp_path):
    import sqlite3

    ledger = Ledger(tmp_path / "a.sqlite", 50.0, 1e-4)
    ledger.charge("normalisation", STEP)
    assert charged_for(ledger.path) == ["normalisation"]
    (tmp_path / "b.sqlite").write_bytes(b"not a database" * 100)
    (tmp_path / "c.sqlite").mkdir()
    for name in "bc":
        with pytest.raises(UserError, match="can't be read .*so it isn't deleted"):
            charged_for(tmp_path / f"{name}.sqlite")
    holder = sqlite3.connect(ledger.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="database is locked.*isn't deleted"):
        charged_for(ledger.path)
    holder.close()


MAKER = textwrap.dedent(
    """
    import sys
    from primia_lite.config import UserError
    from primia_lite.privacy.ledger import Ledger
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        print("made", Ledger(sys.argv[1], float(sys.argv[2]), 1e-4).target_epsilon)
    except UserError as error:
        print("refused", error)
    """
)


def test_two_processes_make_one_ledger_and_the_other_budget_is_refused(tmp_path):
    command = [sys.executable, "-c", MAKER, str(tmp_path / "a.sqlite")]
    makers = [
        subprocess.Popen([*command, budget], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for budget in ("2", "3")
    ]
    assert all(maker.stdout.readline() == "ready\n" for maker in makers)
    for maker in makers:
        maker.stdin.write("go\n")
        maker.stdin.flush()
    said = [maker.communicate(timeout=600)[0] for maker in makers]
    assert sorted(line.split()[0] for line in said) == ["made", "refused"]
    assert "was opened for epsilon" in "".join(said)
    assert [p.name for p in tmp_path.iterdir()] == ["a.sqlite"]


def test_a_budget_too_small_to_release_anything_is_refused_on_opening(tmp_path):
    with pytest.raises(UserError, match="target_epsilon is 0.0001: .* could release nothing"):
        Ledger(tmp_path / "a.sqlite", 0.0001, 1e-4)
    Ledger(tmp_path / "b.sqlite", 0.01, 1e-4).charge("one look", Release(10_000.0, 1.0, 1))
