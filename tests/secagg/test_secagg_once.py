"""Without DP a hospital answers a round once, whatever the session: sums with other survivors would be subtracted."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from parties import Round, relayed
from scipy import stats

from primia_lite import secagg
from primia_lite.apps.flower.hospital import FlowerHospital
from primia_lite.apps.hospital_rounds import HospitalRounds
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecureAggregation
from primia_lite.federation.hospital import Hospital, Update
from primia_lite.federation.rounds import Schedule, ServerOptimizer, federate
from primia_lite.federation.study import Study
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.secagg import ProtocolError, Question, SecAggClient, TooFewSurvivors
from primia_lite.training import Training

ONE, OTHER, NEXT = Question("study:1", "w"), Question("study:1", "v"), Question("study:2", "w")


def again(before, session, question=ONE, **leave):
    return Round(before=before, session=session, question=question, updates=before.updates, leave=leave)


# --- the protocol -----------------------------------------------------------------------------------------------------


def test_no_hospital_signs_two_lists_of_one_round():
    """Three hospitals, a threshold of two, and a server alone: from three sums it would solve for each update."""
    first = Round(3, question=ONE, leave={"mask": "C"}).finish()
    for session, gone in ((2, "B"), (3, "A"), (4, "")):
        party = again(first, session, mask=gone)
        with pytest.raises(ProtocolError, match="signed"):
            party.finish()
        assert party.server.total is None


def test_the_same_hospitals_may_answer_again_and_the_sum_is_the_same():
    first = Round(3, question=ONE, leave={"mask": "C"}).finish()
    same = again(first, 2, mask="C").finish()
    assert np.array_equal(first.server.total, same.server.total)
    assert again(first, 3, NEXT).finish().server.survivors == tuple("ABC")  # another round, all of them


def test_other_weights_for_a_round_are_refused_before_anything_is_computed():
    first = Round(3, question=ONE).finish()
    party = again(first, 2, OTHER).until("mask")
    with pytest.raises(ProtocolError, match="weights"):
        party.clients["A"].answer(party.request("A"), lambda: pytest.fail("it was computed"), OTHER)


@pytest.mark.parametrize("step", ["advertise", "share", "mask"])
def test_a_round_that_ended_before_a_list_was_signed_may_be_asked_with_anybody(step):
    first = Round(3, question=ONE, leave={step: "AB"})
    with pytest.raises(TooFewSurvivors) as error:
        first.finish()
    assert "without DP" not in str(error.value)
    assert again(first, 2, mask="C").finish().server.survivors == ("A", "B")


@pytest.mark.parametrize("step", ["confirm", "unmask"])
def test_a_round_that_ended_later_may_be_asked_with_the_same_alone(step):
    first = Round(4, question=ONE, leave={"mask": "D", step: "BC"})
    with pytest.raises(TooFewSurvivors, match="without"):
        first.finish()
    with pytest.raises(ProtocolError, match="signed"):
        again(first, 2).finish()
    again(first, 3, mask="D").finish()


def test_with_noise_a_round_may_be_asked_with_anybody():
    first = Round(4, leave={"unmask": "CD"})
    with pytest.raises(TooFewSurvivors) as error:
        first.finish()
    assert "without DP" not in str(error.value)
    again(first, 2, None, mask="D").finish()


@pytest.mark.parametrize("other", [OTHER, NEXT, None])
def test_updates_of_other_rounds_or_weights_are_left_out_and_do_not_cancel(other):
    """Else a server gives one hospital the true weights, and the others such that their updates are nothing."""
    party = Round(3, 4096, question={"A": ONE, "B": ONE, "C": other}).until("mask")
    replies = {reply.sender: reply for reply in party.replies()}
    for name in "AB":
        party.server.receive(replies[name])
    with pytest.raises(ProtocolError, match="answers"):
        party.server.receive(replies["C"])
    # A server that sums it all the same, and gets all shares:
    total = sum(reply.vector for reply in replies.values())
    request = secagg.request("confirm", 1, survivors=list("ABC"))
    confirmed = [relayed(party.ask(name, request)) for name in "ABC"]
    replies = [party.ask(name, secagg.request("unmask", 1, confirmed=confirmed)) for name in "ABC"]
    point, seeds = party.agreement.point, []
    for name in "ABC":
        shares = {point[reply.sender]: bytes.fromhex(reply.body["seeds"][name]) for reply in replies}
        seeds.append((secagg.shares.combine(shares, party.agreement.share_threshold), -1))
    secagg.add_masks(total, seeds)
    assert stats.kstest(total / 2**32, "uniform").pvalue > 1e-9
    assert not np.array_equal(total.view(np.int32), party.exact("ABC"))


def test_what_was_signed_outlives_the_client_and_the_agreement():
    answered = {name: {} for name in "ABC"}
    first = Round(3, question=ONE)
    first.clients = {n: SecAggClient(n, key, first.agreement, answered=answered[n]) for n, key in first.keys.items()}
    first.finish()
    kept = json.loads(json.dumps(answered))
    party = again(first, 2, mask="C")
    party.clients = {n: SecAggClient(n, key, party.agreement, 1, kept[n]) for n, key in party.keys.items()}
    with pytest.raises(ProtocolError, match="signed"):
        party.finish()


def test_a_round_s_question_is_kept_between_steps():
    first = Round(3, question=ONE, leave={"mask": "C"}).until("confirm")
    for name, key in first.keys.items():
        first.clients[name] = SecAggClient(name, key, first.agreement).restore(first.clients[name].save())
    first.finish()
    with pytest.raises(ProtocolError, match="signed"):
        again(first, 2).finish()


# --- in one process ---------------------------------------------------------------------------------------------------


def test_secure_aggregation_in_one_process_answers_a_round_once():
    gone = set()
    way = SecureAggregation(2, absent=lambda number, step: gone if step == "mask" else ())
    like, sizes = {"w": torch.zeros(4)}, dict.fromkeys("ABC", 10)
    ask = {name: lambda i=i: Update({"w": torch.full((4,), float(i))}, 1, False) for i, name in enumerate("ABC")}
    gone.add("C")
    assert way.aggregate(ask, sizes, like, 1, question=ONE).survivors == ("A", "B")
    for other in "AB":
        gone.clear()
        gone.add(other)
        with pytest.raises(ProtocolError, match="signed"):
            way.aggregate(ask, sizes, like, 1, question=ONE)
    # Another number of entries is another agreement, of the same hospitals.
    with pytest.raises(ProtocolError, match="signed"):
        ask_more = {name: lambda: Update({"w": torch.zeros(5)}, 1, False) for name in "ABC"}
        way.aggregate(ask_more, sizes, {"w": torch.zeros(5)}, 1, question=ONE)
    assert way.aggregate(ask, sizes, like, 1).survivors == ("B", "C") if gone == {"A"} else ("A", "C")


def films(seed: int, n: int = 60) -> Films:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    inputs = torch.randn(n, 1, 8, generator=generator)
    return Films(inputs, labels, np.array([f"{seed}-{i}" for i in range(n)]), model="litenet")


TRAINING = Training(sample_rate=0.5, learning_rate=0.5)


@pytest.mark.parametrize("private", [False, True])
def test_a_run_goes_on_with_others_only_under_dp(tmp_path, private):
    group = [Hospital(name, films(k)) for k, name in enumerate("ABC")]
    gone = {"confirm": "BC"}
    way = SecureAggregation(2, absent=lambda number, step: gone.get(step, ()) if number == 2 else ())
    options = {"folder": tmp_path, "aggregator": way, "progress": None}
    privacy = Privacy(2.0, 0.5, 100.0) if private else None
    with pytest.raises(TooFewSurvivors):
        federate(group, TRAINING, Schedule(3), privacy, **options)
    gone.clear()
    gone["mask"] = "C"
    if private:
        result = federate(group, TRAINING, Schedule(3), privacy, **options)
        assert [record.get("absent") for record in result.history] == [None, ["C"], None]
    else:
        with pytest.raises(ProtocolError, match="signed"):
            federate(group, TRAINING, Schedule(3), privacy, **options)
        gone.clear()
        assert len(federate(group, TRAINING, Schedule(3), privacy, **options).history) == 3


# --- over Flower ------------------------------------------------------------------------------------------------------


class Sites:
    """Three hospitals behind Flower, and a server that does as it likes."""

    def __init__(self, rounds=1, privacy=None, folder=None):
        self.hospitals = {name: Hospital(name, films(k)) for k, name in enumerate("ABC")}
        self.keys = {name: Ed25519PrivateKey.generate() for name in "ABC"}
        public = {name: key.public_key().public_bytes_raw() for name, key in self.keys.items()}
        sizes = {name: h.declared(privacy) for name, h in self.hospitals.items()}
        self.agreement = secagg.Agreement(public, sizes, 24)
        self.study = Study("trial", "films", TRAINING, privacy, rounds, self.agreement).to_bytes()
        self.folder, self.kept = folder, tempfile.TemporaryDirectory()
        self.weights = {k: v.numpy() for k, v in ServerOptimizer.start(TRAINING, Schedule(1), (8,), 0).state.items()}
        self.restart()

    def restart(self):
        """New processes, which know what was kept."""
        self.sites = {}
        for name, key in self.keys.items():
            site = FlowerHospital(name, key, self.study, lambda _, n=name: self.hospitals[n], self.folder)
            site.rounds = HospitalRounds(name, key, Path(self.kept.name) / name)
            self.sites[name] = site

    def round(self, session, without="", number=1, weights=None, until=None):
        server = secagg.SecAggServer(self.agreement, session)

        def exchange(step, requests):
            for name, request in requests.items():
                if not (name in without and step in ("mask", "confirm", "unmask")) and step != until:
                    given = (self.weights if weights is None else weights) if step == "mask" else None
                    asked = number[name] if isinstance(number, dict) else number
                    yield from self.sites[name].answer(self.sites[name].fingerprint, [request], asked, given)

        secagg.run_round(server, exchange)
        return server


@pytest.mark.parametrize("sessions", [(10, 11, 12), (10, 12, 14), (11, 13, 14)])
@pytest.mark.parametrize("restart", [False, True])
def test_a_hospital_behind_flower_answers_a_round_once_whatever_the_session(sessions, restart, caplog):
    sites = Sites()
    sites.round(sessions[0], "C")
    for session, gone in zip(sessions[1:], "BA", strict=True):
        if restart:
            sites.restart()
        with pytest.raises(TooFewSurvivors):
            sites.round(session, gone)
        assert "signed other survivors" in caplog.text
    assert sites.round(20, "C").survivors == ("A", "B")


def test_a_hospital_behind_flower_answers_for_one_set_of_weights_and_a_number_of_the_study(caplog):
    sites = Sites(rounds=2)
    sites.round(10)
    nearly = {name: value + 1e-6 for name, value in sites.weights.items()}
    with pytest.raises(TooFewSurvivors, match="mask"):
        sites.round(11, weights=nearly)
    for session, number in enumerate((0, 3, True, 1.0, "1"), 12):
        with pytest.raises(TooFewSurvivors, match="mask"):
            sites.round(session, number=number)
    with pytest.raises(TooFewSurvivors, match="mask"):  # told other numbers, they don't make one sum
        Sites(rounds=3).round(10, number={"A": 1, "B": 2, "C": 3})
    assert sites.round(20, "C", number=2).survivors == ("A", "B")


def test_a_hospital_behind_flower_may_be_asked_again_under_dp_and_before_it_signed(tmp_path):
    sites = Sites()
    with pytest.raises(TooFewSurvivors):
        sites.round(10, "C", until="confirm")
    assert sites.round(11, "B").survivors == ("A", "C")
    private = Sites(privacy=Privacy(2.0, 0.5, 100.0), folder=tmp_path)
    assert private.round(10, "C").survivors == ("A", "B")
    assert private.round(11, "B").survivors == ("A", "C")
    charged = {n: len(h.ledger(tmp_path, Privacy(2.0, 0.5, 100.0)).charges()) for n, h in private.hospitals.items()}
    assert charged == {"A": 2, "B": 1, "C": 1}
