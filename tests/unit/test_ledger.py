"""The ledger charges before, refuses overspending, and survives kills and crowds."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from primia_lite.config import BudgetError, UserError
from primia_lite.privacy.accounting import Release, epsilon
from primia_lite.privacy.ledger import Ledger

STEP = Release(1.0, 0.25, 2)


def test_charges_add_up_until_the_budget_is_spent(tmp_path):
    ledger = Ledger(tmp_path / "a.sqlite", 4.0, 1e-4)
    paid = 0
    with pytest.raises(BudgetError, match=r"a: round \d+ would bring epsilon to .* over the budget of 4"):
        for paid in range(1000):
            ledger.charge(f"round {paid}", STEP)
    assert len(ledger.charges()) == paid
    assert ledger.epsilon() <= 4.0
    assert epsilon([*ledger.charges(), STEP], 1e-4) > 4.0


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
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
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
    with pytest.raises(UserError, match="a.sqlite can't be charged .*full.*nothing was computed"):
        for number in range(500):
            ledger.charge(f"round {number} " + "x" * 200, Release(50.0, 0.01, 1), repeatable=True)
    monkeypatch.setattr(Ledger, "_connect", connect)
    assert len(ledger.charges()) == number
