"""Federated rounds: the algorithm, its checkpoints, and kills at any moment."""

import errno
import hashlib
import hmac
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from primia_lite.config import BudgetError, TrainingError, UserError
from primia_lite.data import phantom
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecureAggregation, WeightedMean
from primia_lite.federation.hospital import Hospital, declare_size, local_update
from primia_lite.federation.normalisation import mean_and_std_under_dp
from primia_lite.federation.rounds import Schedule, federate, pool
from primia_lite.models import build, prepare
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.accounting.rdp import filter_epsilon, filter_order
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training


def tabular(n, seed=0, d=8, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    inputs = torch.randn(n, 1, d, generator=generator) + 2.0 * F.one_hot(labels, d)[:, None].float()
    return Films(inputs, labels, np.array([f"{seed}-{i}" for i in range(n)]))


def hospitals(sizes=(60, 40, 100)):
    return [Hospital(name, tabular(n, seed)) for seed, (name, n) in enumerate(zip("ABC", sizes, strict=False))]


PRIVACY = Privacy(2.0, 0.5, target_epsilon=100.0)
TRAINING = Training(sample_rate=0.5, learning_rate=0.5)


def start():
    return build("litenet", 3, (8,)).state_dict()


def run(rounds=1, privacy=None, *, group=None, training=TRAINING, **more):
    return federate(group or hospitals(), training, Schedule(rounds), privacy, **{"progress": None} | more)


def spoilt(films, **changes):
    films = replace(films, **{name: getattr(films, name).clone() for name in changes})
    for name, value in changes.items():
        getattr(films, name)[3:] = value
    return films


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_one_full_batch_step_is_plain_gradient_descent_on_all_films():
    # FedSGD's identity (McMahan et al. 2017): with weights n_k / n and one full-batch step, federated equals pooled.
    group = hospitals()
    training = Training(sample_rate=1.0, learning_rate=0.3)
    result = federate(group, training, Schedule(5), progress=None)
    everything = pool(group).films
    model = build("litenet", 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(everything.inputs[:, 0]), everything.labels).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value, atol=1e-6, rtol=1e-5)


def test_server_momentum_and_averaging_follow_their_definitions():
    group, training = hospitals((50,)), Training(sample_rate=1.0, learning_rate=0.3)
    result = federate(group, training, Schedule(4, server_momentum=0.9, average_last=2), progress=None)
    films = group[0].films
    model = build("litenet", 3, (8,))
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    iterates = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(films.inputs[:, 0]), films.labels).backward()
        optimizer.step()
        iterates.append({k: v.clone() for k, v in model.state_dict().items()})
    for name in result.state:
        torch.testing.assert_close(
            result.state[name], (iterates[2][name] + iterates[3][name]) / 2, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("n", [1, 2])
def test_two_hospitals_or_more_are_summed_securely_by_default(tmp_path, n):
    federate(hospitals((60, 40)[:n]), TRAINING, Schedule(1), folder=tmp_path, progress=None)
    same_run, other_run = (WeightedMean(), SecureAggregation()) if n == 1 else (SecureAggregation(), WeightedMean())
    group = hospitals((60, 40)[:n])
    federate(group, TRAINING, Schedule(1), folder=tmp_path, aggregator=same_run, progress=None)
    with pytest.raises(UserError, match="another"):
        federate(group, TRAINING, Schedule(1), folder=tmp_path, aggregator=other_run, progress=None)


def test_local_update_is_pure():
    films, state = tabular(30), start()
    copy = {k: v.clone() for k, v in state.items()}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = local_update(state, films, TRAINING, PRIVACY, SecureGenerator.from_seed(1), declared_size=30)
    assert same(state, copy) and torch.equal(torch.random.get_rng_state(), before)
    again = local_update(state, films, TRAINING, PRIVACY, SecureGenerator.from_seed(1), declared_size=30)
    other = local_update(state, films, TRAINING, PRIVACY, SecureGenerator.from_seed(2), declared_size=30)
    assert same(first.delta, again.delta) and not same(first.delta, other.delta)
    assert first.seeded


def test_private_step_divides_by_the_declared_size_not_the_count():
    films, state = tabular(30), start()
    quiet = Privacy(1e-9, 0.5, 8)
    small, large = (
        local_update(state, films, Training(sample_rate=1.0), quiet, SecureGenerator.from_seed(0), declared_size=size)
        for size in (30, 60)
    )
    torch.testing.assert_close(small.delta["weight"], 2 * large.delta["weight"])


def test_epsilon_is_reported_for_each_hospital_and_as_the_maximum(tmp_path):
    result = run(3, PRIVACY, folder=tmp_path)
    assert set(result.epsilon) == {"A", "B", "C"}
    filtered = filter_epsilon(PRIVACY.release(0.5, 3), 1e-4, filter_order(100.0, 1e-4))
    assert result.epsilon_max == max(result.epsilon.values()) == pytest.approx(filtered)
    planned = Privacy.for_budget(8.0, sample_rate=0.5, steps=3, max_grad_norm=0.5)
    result = federate(hospitals(), TRAINING, Schedule(3), planned, folder=tmp_path / "planned", progress=None)
    assert result.epsilon_max == pytest.approx(planned.epsilon(0.5, 3)) and result.epsilon_max <= 8.0
    assert not result.seeded and result.label == ""
    seeded = run(1, PRIVACY, folder=tmp_path / "s", noise_seed=1)
    assert seeded.label == "seeded: not private"


def test_two_private_runs_differ_and_two_seeded_ones_do_not(tmp_path):
    a, b, c, d = (
        run(2, PRIVACY, folder=tmp_path / name, noise_seed=seed).state
        for name, seed in (("a", None), ("b", None), ("c", 7), ("d", 7))
    )
    assert not same(a, b) and same(c, d)


def test_history_and_lines_headless(tmp_path, capsys):
    result = federate(hospitals(), TRAINING, Schedule(3), validation=tabular(50, 9), progress="federated")
    assert [r["round"] for r in result.history] == [1, 2, 3]
    assert {"auroc", "accuracy", "mcc", "loss"} <= result.history[-1].keys()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and lines[-1].startswith("federated: round 3/3  AUROC 0.")


# --- checkpoints ------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def long_run(folder, sender=None):
    progress = (lambda record: sender.send(record["round"])) if sender else None
    schedule = Schedule(20, server_momentum=0.9, average_last=10)
    return federate(hospitals(), TRAINING, schedule, PRIVACY, folder=folder, noise_seed=3, progress=progress).state


def run_until_killed(folder, at_round, after_s):
    """Start the run in a process of its own and kill it some time after a round; returns whether it still ran."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=long_run, args=(folder, sender))
    process.start()
    sender.close()
    while receiver.recv() < at_round:
        pass
    time.sleep(after_s)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@needs_fork
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(tmp_path):
    whole = long_run(tmp_path / "whole")
    moments = [(at, random.Random(at).uniform(0, 0.02)) for at in (3, 9, 16)]
    assert sum(run_until_killed(tmp_path / "killed", *moment) for moment in moments) >= 2
    assert same(whole, long_run(tmp_path / "killed"))
    assert not list((tmp_path / "killed").glob("update-*"))


def test_a_round_charged_twice_fits_a_budget_with_spare_steps(tmp_path, monkeypatch):
    privacy = Privacy.for_budget(8.0, sample_rate=0.5, steps=6, spare_steps=1, max_grad_norm=0.5)
    group = hospitals()

    class Killed(Exception):
        pass

    def die(*args, **kwargs):
        raise Killed

    run(6, privacy, group=group, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("primia_lite.federation.hospital.local_update", die)  # after the charge, before the release
        with pytest.raises(Killed):
            run(6, privacy, group=group, folder=tmp_path / "run")
    result = federate(hospitals(), TRAINING, Schedule(6), privacy, folder=tmp_path / "run", progress=None)
    steps = [sum(r.steps for r in h.ledger(tmp_path / "run", privacy).charges()) for h in result.hospitals]
    assert steps == [7, 6, 6] and result.epsilon_max <= 8.0


def test_normalisation_and_training_share_one_budget(tmp_path):
    films = phantom.generate(60, 28, seed=3)
    parts = [("A", films.subset(np.arange(30))), ("B", films.subset(np.arange(30, 60)))]
    shared = Release(10.0, 1.0, 1)
    privacy = Privacy.for_budget(8.0, sample_rate=0.5, steps=3, max_grad_norm=1.0, also=(shared,))
    rng = SecureGenerator()
    normalisation = mean_and_std_under_dp(parts, shared.noise_multiplier, tmp_path, privacy, rng)
    group = [Hospital(name, prepare("ckksnet", part, normalisation=normalisation)) for name, part in parts]
    training = Training(model="ckksnet", sample_rate=0.5, learning_rate=0.01)
    result = federate(group, training, Schedule(3), privacy, folder=tmp_path, progress=None)
    assert group[0].films.normalisation == normalisation
    assert shared in group[0].ledger(tmp_path, privacy).charges()
    assert 7.5 <= result.epsilon_max <= 8.0
    with pytest.raises(BudgetError):
        group[0].update(4, result.state, training, privacy, rng, tmp_path)


def test_each_unseeded_update_has_noise_of_its_own(tmp_path):
    """One generator passed for two rounds: equal noise would make the difference of the updates exact."""
    noisy = Privacy(1000.0, 0.5, target_epsilon=100.0)
    rng, hospital = SecureGenerator(), hospitals()[0]
    state = start()
    one, two = (hospital.update(i, state, TRAINING, noisy, rng, tmp_path / str(i)).delta["weight"] for i in (1, 2))
    assert float((one - two).std()) == pytest.approx(np.sqrt(2) * float(one.std()), rel=0.7)
    rng = SecureGenerator()
    local_update(state, hospital.films, TRAINING, noisy, rng, declared_size=60)
    with pytest.raises(UserError, match="repeat"):
        local_update(state, hospital.films, TRAINING, noisy, rng, declared_size=60)


def test_a_run_does_not_go_on_with_a_ledger_that_was_deleted(tmp_path):
    run(2, PRIVACY, folder=tmp_path)
    (tmp_path / "ledger-A.sqlite").unlink()
    with pytest.raises(UserError, match="deleted"):
        run(2, PRIVACY, folder=tmp_path)


def test_a_ledger_deleted_during_a_run_stops_it(tmp_path):
    group = hospitals()

    def delete(record):
        if record["round"] == 2:
            (tmp_path / "ledger-B.sqlite").unlink()

    with pytest.raises(UserError, match="gone"):
        run(4, PRIVACY, group=group, folder=tmp_path, progress=delete)
    result = run(1, PRIVACY, group=group, folder=tmp_path, fresh=True)
    assert set(result.epsilon) == set("ABC")


def test_fresh_keeps_a_ledger_that_it_cannot_read(tmp_path):
    run(1, PRIVACY, folder=tmp_path)
    (tmp_path / "ledger-A.sqlite").write_bytes(b"damaged" * 1000)
    with pytest.raises(UserError, match="deleted"):
        run(1, PRIVACY, folder=tmp_path, fresh=True)
    assert (tmp_path / "ledger-A.sqlite").exists()


def test_fresh_deletes_a_run_and_nothing_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("a year's work")
    run(1, PRIVACY, folder=tmp_path, fresh=True)
    result = run(2, PRIVACY, folder=tmp_path, fresh=True)
    assert (tmp_path / "thesis.tex").exists()
    assert sum(r.steps for r in result.hospitals[0].ledger(tmp_path, PRIVACY).charges()) == 2
    other = tmp_path / "other"
    Ledger(other / "ledger-A.sqlite", 100.0, 1e-4).charge("normalisation", Release(10.0, 1.0, 1))
    for _ in ("before a run", "after it"):
        with pytest.raises(UserError, match="normalisation"):
            run(1, PRIVACY, folder=other, fresh=True)
        run(1, PRIVACY, folder=other)


def test_a_kill_while_fresh_deletes_leaves_a_folder_that_can_be_started_anew(tmp_path, monkeypatch):
    first = run(2, folder=tmp_path)
    unlink, done = Path.unlink, []

    def killed(self, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(self)
        unlink(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        run(2, folder=tmp_path, fresh=True)
    assert (tmp_path / "run.json").exists() and not (tmp_path / "checkpoint.pt").exists()
    again = run(2, folder=tmp_path, fresh=True)
    assert same(first.state, again.state)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="checkpoint"):
        run(2, folder=tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    def second(record):
        with pytest.raises(UserError, match="training"):
            run(2, folder=tmp_path)
        tried.append(record["round"])

    tried = []
    run(2, folder=tmp_path, progress=second)
    assert tried == [1, 2]


def test_contradictions_are_refused_before_anything_is_charged(tmp_path):
    group = hospitals()
    for training in (TRAINING.changed(augmentation=("mixup",)), TRAINING.changed(class_weights="balanced")):
        with pytest.raises(UserError, match="mixup blends|balanced"):
            group[0].update(1, start(), training, PRIVACY, SecureGenerator(), tmp_path)
        with pytest.raises(UserError, match="mixup blends|balanced"):
            federate(group, training, Schedule(1), PRIVACY, folder=tmp_path, progress=None)
    assert not list(tmp_path.glob("ledger-*"))
    waves = [replace(h, films=replace(h.films, model="scatternet")) for h in group]
    with pytest.raises(UserError, match="scatternet"):
        federate(waves, TRAINING, Schedule(1), progress=None)
    group[1].films = replace(group[1].films, normalisation=(0.1, 0.2))
    with pytest.raises(UserError, match="normalised"):
        federate(group, TRAINING, Schedule(1), progress=None)
    with pytest.raises(UserError, match="different"):
        pool(group)
    with pytest.raises(UserError, match="declared_size"):
        Hospital("A", tabular(10), declared_size=-5)
    for epsilon, delta in ((-3.0, 1e-4), (float("inf"), 1e-4), (8.0, 7.0)):
        with pytest.raises(UserError, match="target_"):
            Privacy(1.0, 1.0, epsilon, delta)


def test_a_stored_update_is_sent_again_and_not_charged_again(tmp_path):
    hospital = hospitals()[0]
    state = start()
    first = hospital.update(1, state, TRAINING, PRIVACY, SecureGenerator(), tmp_path)
    again = hospital.update(1, state, TRAINING, PRIVACY, SecureGenerator(), tmp_path)
    assert same(first.delta, again.delta)
    assert len(hospital.ledger(tmp_path, PRIVACY).charges()) == 1
    moved = hospital.update(1, {k: v + 1.0 for k, v in state.items()}, TRAINING, PRIVACY, SecureGenerator(), tmp_path)
    assert not same(first.delta, moved.delta)  # of other weights it is another release
    assert len(hospital.ledger(tmp_path, PRIVACY).charges()) == 2
    slower = TRAINING.changed(learning_rate=0.1)
    hospital.update(1, {k: v + 1.0 for k, v in state.items()}, slower, PRIVACY, SecureGenerator(), tmp_path)
    assert len(hospital.ledger(tmp_path, PRIVACY).charges()) == 3  # and so is one of other settings
    (tmp_path / "update-A-00001.pt").unlink()
    fresh = hospital.update(1, state, TRAINING, PRIVACY, SecureGenerator(), tmp_path)
    assert not same(first.delta, fresh.delta)
    assert len(hospital.ledger(tmp_path, PRIVACY).charges()) == 4


def test_no_state_of_a_generator_is_on_the_disk(tmp_path):
    own, seeded = os.urandom(32), hashlib.sha256(b"primia_lite seed 5").digest()
    assert SecureGenerator(seeded).bytes(64) == SecureGenerator.from_seed(5).bytes(64)
    hospital = hospitals()[0]
    hospital.update(1, start(), TRAINING, PRIVACY, SecureGenerator(own), tmp_path)
    run(2, PRIVACY, folder=tmp_path / "run", noise_seed=5)
    keys = {own, seeded, hmac.digest(seeded, b"round/1/A", "sha256")}
    content = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert len(content) > 1000
    assert not any(key in content for key in keys)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    real = os.fsync
    good = {}

    def full(descriptor):
        if "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    def after(record):
        if record["round"] == 2:
            good["bytes"] = (tmp_path / "checkpoint.pt").read_bytes()
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(UserError, match="checkpoint"):
        run(4, folder=tmp_path, progress=after)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good["bytes"]
    assert not list(tmp_path.glob(".checkpoint*"))
    monkeypatch.setattr(os, "fsync", real)
    resumed = run(4, folder=tmp_path)
    assert same(resumed.state, run(4).state)


def test_a_folder_of_another_run_is_refused_and_fresh_replaces_it(tmp_path):
    run(2, folder=tmp_path)
    with pytest.raises(UserError, match="holds"):
        run(2, training=TRAINING.changed(learning_rate=0.1), folder=tmp_path)
    run(2, training=TRAINING.changed(learning_rate=0.1), folder=tmp_path, fresh=True)


# --- units and ledgers ------------------------------------------------------------------------------------------------


def families(n=60, seed=0, films_each=3):
    films = tabular(n, seed)
    return replace(films, patient_id=np.array([f"{seed}-{i // films_each}" for i in range(n)]))


def test_the_unit_sets_the_declared_number_the_weights_and_the_ledger(tmp_path):
    group = [Hospital("A", families(60)), Hospital("B", tabular(60, 1))]
    assert [(h.declared_size, h.declared_patients) for h in group] == [(60, 20), (60, 60)]
    by_patient = Privacy(2.0, 0.5, target_epsilon=100.0)
    by_film = replace(by_patient, unit="film")
    assert declare_size(1234) == 1230 and declare_size(3) == 10
    assert [group[0].declared(p) for p in (by_patient, by_film, None)] == [20, 60, 60]
    weights = []

    class Watch:
        name = "watch"

        def aggregate(self, ask, sizes, *rest, **more):
            weights.append({h: size / sum(sizes.values()) for h, size in sizes.items()})
            return WeightedMean().aggregate(ask, sizes, *rest, **more)

    for privacy in (by_patient, by_film, None):
        where = tmp_path / (privacy.unit if privacy else "plain")
        run(1, privacy, group=group, folder=where, aggregator=Watch())
    assert weights == [{"A": 0.25, "B": 0.75}, {"A": 0.5, "B": 0.5}, {"A": 0.5, "B": 0.5}]
    assert Ledger(tmp_path / "patient" / "ledger-A.sqlite").unit == "patient"
    assert Ledger(tmp_path / "film" / "ledger-A.sqlite").unit == "film"


def test_a_lasting_ledger_counts_every_run_and_outlives_fresh(tmp_path):
    lasting = Ledger(tmp_path / "hospital-A.sqlite", 9.0, 1e-4)
    group = hospitals()
    group[0].lasting_ledger = lasting
    for name in ("first", "second"):
        for _ in range(2):
            run(2, PRIVACY, group=group, folder=tmp_path / name, fresh=True)
    assert sum(r.steps for r in lasting.charges()) == 8
    assert [row["what"] for row in lasting.statement()][:3] == [
        "first: round 1", "first: round 2", "first: round 1 (again 1)"
    ]  # fmt: skip
    assert not (tmp_path / "first" / "ledger-A.sqlite").exists()
    with pytest.raises(BudgetError, match="third"):
        run(90, PRIVACY, group=group, folder=tmp_path / "third")
    assert lasting.epsilon() <= 9.0
    with pytest.raises(UserError, match="patient"):
        group[0].update(1, {}, TRAINING, replace(PRIVACY, unit="film"), SecureGenerator(), tmp_path)
    with pytest.raises(UserError, match="noise"):
        group[0].update(1, {}, TRAINING, PRIVACY, SecureGenerator.from_seed(1), tmp_path)


def test_a_delta_that_allows_publishing_a_patient_warns(tmp_path):
    generous = Privacy(1.0, 1.0, 80.0, 0.01)
    with pytest.warns(UserWarning, match="target_delta"):
        federate(hospitals(), TRAINING, Schedule(1), generous, folder=tmp_path, progress=None)


def test_a_refused_step_stays_charged(tmp_path):
    group = hospitals()
    group[0].films.inputs[3] = 3e38  # finite itself, but not once it meets weights
    training = TRAINING.changed(sample_rate=1.0, learning_rate=1e6)
    with pytest.raises(TrainingError, match="hospital"):
        federate(group, training, Schedule(2), PRIVACY, folder=tmp_path, aggregator=WeightedMean(), progress=None)
    assert group[0].ledger(tmp_path, PRIVACY).charges() == [Release(2.0, 1.0, 1)] * 2
    assert not list(tmp_path.glob("update-A-00002*"))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_spent_budget_stops_the_run_and_keeps_what_was_reached(tmp_path):
    tight, order = Privacy(2.0, 0.5, target_epsilon=3.0), filter_order(3.0, 1e-4)
    fits = max(n for n in range(20) if filter_epsilon(tight.release(0.5, n), 1e-4, order) <= 3.0)
    assert 1 <= fits < 12
    with pytest.warns(UserWarning, match="hospital"), pytest.raises(BudgetError, match="checkpoint"):
        federate(hospitals(), TRAINING, Schedule(12), tight, folder=tmp_path, progress=None)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["round"] == fits


def test_an_exploding_loss_names_hospital_and_round():
    with pytest.raises(TrainingError, match="learning_rate"):
        run(20, training=TRAINING.changed(learning_rate=1e38), aggregator=WeightedMean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule(0), "rounds"),
        (lambda: Schedule(3, average_last=4), "average_last"),
        (lambda: Schedule(3, server_momentum=1.0), "server_momentum"),
        (lambda: Training(model="vgg"), "unknown"),
        (lambda: Training(sample_rate=0), "sample_rate"),
        (lambda: Training(local_epochs=1), "local_epochs"),
        (lambda: Training(augmentation=("blur",)), "augmentation"),
        (lambda: Training(class_weights="even"), "class_weights"),
        (lambda: Training(class_weights=(1.0, 2.0)), "numbers"),
        (lambda: Hospital("A", tabular(10).subset(np.zeros(10, bool))), "no films"),
        (lambda: Hospital("A", spoilt(tabular(20), inputs=float("nan"))), "finite"),
        (lambda: Hospital("A", spoilt(tabular(20).subset(np.arange(3, 20)), labels=1).subset([5, 6, 7])), "one class"),
        (lambda: federate([], TRAINING, Schedule(1)), "names"),
        (lambda: federate(hospitals(), TRAINING, Schedule(1), PRIVACY), "federate"),
        (lambda: local_update({"w": torch.zeros(2)}, tabular(10), TRAINING, None, SecureGenerator()), "weights"),
        (lambda: local_update(start(), tabular(10), TRAINING, PRIVACY, SecureGenerator()), "declared_size"),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
