"""Both of Flower's apps in one process: the same weights as federate(), and what each side refuses."""

import json

import numpy as np
import pytest
import torch
from flower_inline import InlineGrid, parties, run_inline
from flwr.app import ConfigRecord, Message, RecordDict
from torch.nn import functional as F

from primia_lite import secagg
from primia_lite.apps.flower import messages as flower_messages
from primia_lite.apps.flower import server as flower_server
from primia_lite.apps.flower.folder import LOG, log, log_to
from primia_lite.apps.flower.hospital import Behind, OtherStudy, fingerprint, now_ms
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.aggregation import SecureAggregation
from primia_lite.federation.hospital import Hospital
from primia_lite.federation.rounds import Schedule, federate
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.ledger import Ledger
from primia_lite.privacy.shared import SharedNoise
from primia_lite.training import Training

pytestmark = pytest.mark.flower
TRAINING = Training(sample_rate=0.5, learning_rate=0.5)
PRIVACY = Privacy(2.0, 0.5, target_epsilon=100.0)


def films(n, seed=0, d=8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    inputs = torch.randn(n, 1, d, generator=generator) + 2.0 * F.one_hot(labels, d)[:, None].float()
    return Films(inputs, labels, np.array([f"{seed}-{i}" for i in range(n)]))


def hospitals(names="ABC"):
    return [Hospital(name, films(40 + 20 * i, i)) for i, name in enumerate(names)]


def steps_of(message: Message) -> list[str]:
    return [json.loads(text)["step"] for text in message.content["request"]["requests"]]


def close(a, b, atol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def study_of(names, rounds):
    """``study.json`` without DP, and each hospital behind Flower."""
    return parties(hospitals(names), TRAINING, rounds=rounds)


# --- the same as in one process ---------------------------------------------------------------------------------------


def test_the_weights_are_those_of_federate_up_to_rounding():
    schedule = Schedule(5, server_momentum=0.9, average_last=2)
    here = federate(hospitals(), TRAINING, schedule, progress=None)
    there = run_inline(hospitals(), TRAINING, schedule)
    assert close(here.state, there.state)
    assert there.history == [{"round": number} for number in range(1, 6)]


def test_a_round_has_three_exchanges_after_the_first():
    seen = []
    run_inline(
        hospitals("AB"), TRAINING, Schedule(3), lost=lambda node, message: seen.append((node, steps_of(message)))
    )
    first = [["advertise"], ["share"], ["mask"], ["confirm", "advertise"], ["unmask", "share"]]
    second = [["mask"], ["confirm", "advertise"], ["unmask", "share"]]
    last = [["mask"], ["confirm"], ["unmask"]]
    assert [steps for node, steps in seen if node == 1] == first + second + last
    assert [steps for node, steps in seen if node == 2] == first + second + last


def test_what_goes_to_hospitals_and_back_is_masked_and_of_the_size_of_float32():
    vectors = []

    def listen(node, reply):
        if "masked" in reply.content:
            vectors.append(reply.content["masked"]["vector"])

    result = run_inline(hospitals(), TRAINING, Schedule(2), spoil=listen)
    entries = sum(value.numel() for value in result.state.values())
    assert len(vectors) == 6
    for array in vectors:
        assert array.dtype == "uint32" and tuple(array.shape) == (entries,)
        assert len(array.data) <= 4 * entries + 256
    # Updates are below 1/64 of the clip: unmasked, the upper six bits would be all equal.
    upper = np.concatenate([array.numpy() for array in vectors]) >> 26
    assert len(np.unique(upper)) > 16


@pytest.mark.parametrize("step", secagg.STEPS)
def test_a_hospital_that_vanishes_at_any_step_leaves_the_sum_of_the_others(step):
    def lost(node, message):
        return node == 2 and steps_of(message)[0] in secagg.STEPS[secagg.STEPS.index(step) :]

    def absent(number, now):
        return {"B"} if secagg.STEPS.index(now) >= secagg.STEPS.index(step) else ()

    here = federate(
        hospitals(), TRAINING, Schedule(1), aggregator=SecureAggregation(absent=absent), progress=None
    )  # fmt: skip
    there = run_inline(hospitals(), TRAINING, Schedule(1), lost=lost)
    assert here.history == there.history
    assert ("absent" in there.history[0]) == (step in secagg.STEPS[:3])
    assert close(here.state, there.state)


@pytest.mark.parametrize(("step", "missed"), [("mask", 1), ("confirm", 2)])
def test_a_hospital_that_misses_an_exchange_misses_one_round_and_comes_back(step, missed):
    """With the confirmation go the next round's keys."""
    lost = []

    def once(node, message):
        if node == 2 and steps_of(message)[0] == step:
            lost.append(1)
            return len(lost) == 1

    result = run_inline(hospitals(), TRAINING, Schedule(4), lost=once)
    assert [record.get("absent") for record in result.history] == [["B"] if n == missed else None for n in range(1, 5)]


def test_too_few_hospitals_end_the_run_without_a_sum_and_ledgers_stay_charged(tmp_path):
    with pytest.raises(secagg.TooFewSurvivors, match="missing"):
        run_inline(
            hospitals(), TRAINING, Schedule(2), PRIVACY, folder=tmp_path,
            lost=lambda node, m: node > 1 and steps_of(m) == ["mask"],
        )  # fmt: skip
    assert sum(r.steps for r in Ledger(tmp_path / "ledger-A.sqlite").charges()) == 1


def test_a_late_reply_is_not_summed_and_its_hospital_comes_back():
    """B's masked update arrives when the server has gone on; it isn't waited for until it has answered."""
    study, sites = study_of("ABC", 3)

    class Slow(InlineGrid):
        held = None

        def push_messages(self, messages):
            messages = list(messages)
            ids = super().push_messages(messages)
            for key, message in zip(ids, messages, strict=True):
                if message.metadata.dst_node_id == 2 and steps_of(message) == ["mask"] and self.held is None:
                    self.held = key, self.replies.pop(key)
            if "unmask" in steps_of(messages[0]) and self.held[1]:
                self.replies[self.held[0]], self.held = self.held[1], (self.held[0], None)
            return ids

    grid = Slow(sites)
    server = flower_server.train(grid, study, Schedule(3), (8,), mask_timeout_s=0.3, poll_s=0.05)
    assert server.history == [{"round": 1, "absent": ["B"]}, {"round": 2}, {"round": 3}]


# --- privacy ----------------------------------------------------------------------------------------------------------


def test_with_dp_each_round_is_charged_once_and_no_update_stays(tmp_path):
    result = run_inline(hospitals(), TRAINING, Schedule(3), PRIVACY, folder=tmp_path)
    for name in "ABC":
        assert sum(r.steps for r in Ledger(tmp_path / f"ledger-{name}.sqlite").charges()) == 3
    assert result.epsilon.keys() == set("ABC") and not result.seeded
    assert list(tmp_path.glob("update-*")) == []


def test_noise_that_hospitals_share_goes_through_too(tmp_path):
    group = hospitals()
    shared = SharedNoise(2, 0, 24, tuple(h.declared_patients for h in group))
    privacy = Privacy(1.0, 0.5, target_epsilon=100.0, shared=shared)
    result = run_inline(group, TRAINING, Schedule(2), privacy, folder=tmp_path, threshold=2)
    assert len(result.history) == 2 and torch.isfinite(result.state["weight"]).all()
    assert not close(result.state, run_inline(group, TRAINING, Schedule(2)).state)


# --- what a hospital checks -------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """Hospital A of a study with DP, with its folder."""
    study, sites = parties(hospitals(), TRAINING, PRIVACY, 2, folder=tmp_path)
    sites[0].others, sites[0].text, sites[0].ledger = {s.name: s for s in sites}, study, tmp_path / "ledger-A.sqlite"
    return sites[0]


def ask(site, number=1, weights=None, session=1, *, until="unmask"):
    """A round with all three hospitals up to a step; the replies of the last one."""
    server = secagg.SecAggServer(site.agreement, session)
    weights = {"weight": np.zeros((3, 8), np.float32)} if weights is None else weights
    while True:
        step, requests = server.step, server.requests()
        found = [r for name, text in requests.items()
                 for r in site.others[name].answer(site.fingerprint, [text], number, weights)]  # fmt: skip
        if step == until:
            return found
        for reply in found:
            server.receive(reply)
        server.close()


def test_a_server_that_asks_for_less_noise_is_refused_before_anything_is_charged(site):
    content = json.loads(site.text)
    content["privacy"]["noise_multiplier"] = 0.1
    other = fingerprint(json.dumps(content).encode())
    with pytest.raises(OtherStudy, match="study"):
        site.answer(other, [secagg.SecAggServer(site.agreement, 1).requests()["A"]])
    assert not site.ledger.exists()


def test_rounds_beyond_the_study_s_and_sessions_that_were_are_refused(site):
    assert len(ask(site, 1, session=1)) == 3
    assert ask(site, 3, session=3, until="mask") == []
    assert ask(site, 0, session=5, until="mask") == []
    with pytest.raises(Behind):
        ask(site, 1, session=3, until="advertise")
    assert len(Ledger(site.ledger).charges()) == 1 and sum(r.steps for r in Ledger(site.ledger).charges()) == 1
    assert len(ask(site, 2, session=7)) == 3


@pytest.mark.parametrize(
    "request_", [b"[" * 100_000, b"{" * 9, b'{"step": "advertise", "session": 1e999}', b'{"step": "advertise"}', b"[1]",
                 b'{"step": "advertise", "session": 9' + b"0" * 5000 + b"}", b"\xff", b'{"step": [], "session": 1}',
                 b'{"step": "advertise", "session": 9000000000000000}', b'{"step": "advertise", "session": true}']
)  # fmt: skip
def test_a_request_that_nobody_can_mean_is_refused_and_the_next_one_answered(site, request_):
    good = secagg.SecAggServer(site.agreement, 1).requests()["A"]
    (reply,) = site.answer(site.fingerprint, [request_, good])
    assert reply.step == "advertise" and reply.session == 1


def test_the_server_can_t_make_up_lines_of_a_hospital_s_log(site, tmp_path):
    log_to(tmp_path)
    with pytest.raises(OtherStudy) as error:
        site.answer("x\n2026 a made-up\x1b[2J", [])
    log.warning("%s", error.value)
    (line,) = (tmp_path / LOG).read_text().splitlines()
    assert line.isprintable() and "made-up"[:4] in line


def test_an_update_that_was_masked_is_not_masked_again(site):
    first, second = (ask(site, 1, session=session, until="mask") for session in (1, 3))
    assert all(not np.array_equal(a.vector, b.vector) for a, b in zip(first, second, strict=True))
    # Other noise, so another release: the ledger has both.
    assert sum(r.steps for r in Ledger(site.ledger).charges()) == 2


def test_a_refusal_tells_the_server_nothing_of_films(site):
    grid = InlineGrid([site])

    def broken(*_):
        raise UserError("film 17 of patient 4711 has values that aren't finite")

    site.hospital.update = broken
    server = secagg.SecAggServer(site.agreement, 1)
    others = [site.others[name] for name in "BC"]
    for _ in range(2):  # advertise, share
        requests = server.requests()
        for one in (site, *others):
            for reply in one.answer(site.fingerprint, [requests[one.name]]):
                server.receive(reply)
        server.close()
    content = flower_messages.request(site.fingerprint, [server.requests()["A"]], 1, None)
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert reply.has_error() and reply.error.reason == "refused: the hospital's log tells why"
    for content in (
        flower_messages.request("00", [b"{}"], 1, None),
        flower_messages.request(site.fingerprint, [b"x"], 1, None),
    ):
        (reply,) = grid.send_and_receive([Message(content, 1, "train")])
        assert reply.has_error() and "4711" not in reply.error.reason


# --- what the server checks -------------------------------------------------------------------------------------------


def test_unreadable_and_forged_replies_count_as_gone():
    def spoil(node, reply):
        if node == 2 and "masked" in reply.content:
            reply.content["reply"]["heads"] = [b"\xff not JSON"]
        if node == 4 and "masked" in reply.content:
            reply.content["masked"]["vector"] = type(reply.content["masked"]["vector"])(np.zeros(24, np.uint32))

    result = run_inline(hospitals("ABCDE"), TRAINING, Schedule(1), threshold=3, spoil=spoil)
    assert result.history == [{"round": 1, "absent": ["B", "D"]}]


@pytest.mark.parametrize("spoil", [
    lambda reply: reply["reply"].update({"heads": [b"{}"] * 3}),
    lambda reply: reply["reply"].update({"heads": [b"[" * 100_000]}),
    lambda reply: reply["reply"].update({"heads": []}),
    lambda reply: reply["reply"].update({"heads": [], "last": 2**62}),
    lambda reply: reply["reply"].update({"heads": [], "last": 1.5}),
    lambda reply: reply.pop("reply"),
    lambda reply: setattr(reply["masked"]["vector"], "data", b"PK\x05\x06" + bytes(18)),
    lambda reply: setattr(reply["masked"]["vector"], "data", b"\x93NUMPY\x01\x00\x76\x00" + (
        b"{'descr': '<u4', 'fortran_order': False, 'shape': (999999999999999,), }".ljust(117) + b"\n")),
])  # fmt: skip
def test_whatever_one_hospital_sends_the_others_are_summed(spoil):
    result = run_inline(
        hospitals(), TRAINING, Schedule(2), threshold=2,
        spoil=lambda node, reply: spoil(reply.content) if node == 2 and "masked" in reply.content else None,
    )  # fmt: skip
    assert [record["absent"] for record in result.history] == [["B"], ["B"]]


# --- clocks -----------------------------------------------------------------------------------------------------------

IN_2037 = 2_114_380_800_000  # ms


def sites_that_took_part(monkeypatch, at_ms, names="ABC"):
    """A study's sites after a round of a server whose clock was there."""
    study, sites = study_of(names, 4)
    with monkeypatch.context() as clock:
        clock.setattr(flower_server, "now_ms", lambda: at_ms)
        train(sites, study, 1)
    return study, sites


def train(sites, study, rounds, spoil=None):
    waits = {"step_timeout_s": 0.3, "start_timeout_s": 0.1, "poll_s": 0.05}
    return flower_server.train(InlineGrid(sites, spoil=spoil), study, Schedule(rounds), (8,), **waits)


@pytest.mark.parametrize("at_ms", [IN_2037, 4_260_000_000_000])  # 2104
def test_a_clock_that_was_ahead_once_locks_no_hospital_out(monkeypatch, at_ms):
    """The server that comes after knows nothing of it: neither its memory nor its disk is there."""
    study, sites = sites_that_took_part(monkeypatch, at_ms)
    before = [max(site.rounds.last_sessions()) for site in sites]
    assert min(before) >= at_ms
    assert train(sites, study, 3).history == [{"round": number} for number in (1, 2, 3)]
    assert all(max(site.rounds.last_sessions()) > last for site, last in zip(sites, before, strict=True))


def test_one_hospital_that_alone_was_asked_by_that_clock_takes_part_again():
    study, sites = study_of("ABC", 4)
    early = [secagg.SecAggServer(sites[0].agreement, number).requests()["A"] for number in (IN_2037, IN_2037 + 1)]
    assert len(sites[0].answer(sites[0].fingerprint, early)) == 2
    history = train(sites, study, 3).history
    assert [record.get("absent") for record in history] == [["A"], None, None]


def test_a_hospital_that_lies_about_its_last_round_locks_nobody_out():
    study, sites = study_of("ABC", 4)
    for site in sites:  # asked in 2037, and nothing signed
        asked = [secagg.SecAggServer(site.agreement, number).requests()[site.name] for number in (IN_2037, IN_2037 + 1)]
        assert len(site.answer(site.fingerprint, asked)) == 2
    century = 100 * 365 * 24 * 3600 * 1000
    for last in (lambda: now_ms() + century - 1000, lambda: 2**62, lambda: IN_2037 + 10):

        def lying(node, reply, last=last):
            if node == 3:
                reply.content = RecordDict({"reply": ConfigRecord({"heads": [], "last": last()})})

        assert [record["absent"] for record in train(sites, study, 2, lying).history] == [["C"], ["C"]]
    # Once C is honest again it is late: without DP these rounds are A's and B's, who have signed for them.
    with pytest.raises(secagg.TooFewSurvivors, match="others"):
        train(sites, study, 2)


def test_a_hospital_takes_no_number_from_a_clock_that_is_centuries_ahead(site):
    far = secagg.SecAggServer(site.agreement, 10**13 + 1).requests()["A"]  # in 2286
    assert site.answer(site.fingerprint, [far]) == []
    assert max(site.rounds.last_sessions()) == 0


def test_sizes_and_sums_must_be_the_study_s(site):
    aggregator = flower_server.FlowerAggregation(None, site.text, dict, 1)
    sizes = dict(site.agreement.sizes)
    for wrong, summed in ((sizes | {"A": 7}, False), (sizes, True)):
        with pytest.raises(UserError, match="study"):
            aggregator.aggregate(dict.fromkeys(sizes), wrong, {}, 1, integer_sum=summed)


def test_more_rounds_than_agreed_are_refused(site):
    with pytest.raises(UserError, match="rounds"):
        flower_server.train(None, site.text, Schedule(3), (8,))


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    study, sites = study_of("AB", 4)
    grid = InlineGrid(sites)
    folder = tmp_path / "run"
    folder.mkdir()
    flower_server.train(grid, study, Schedule(2), (8,), folder=folder)
    server = flower_server.train(grid, study, Schedule(4), (8,), folder=folder)
    assert [record["round"] for record in server.history] == [1, 2, 3, 4]
    assert close(server.state, federate(hospitals("AB"), TRAINING, Schedule(4), progress=None).state)


def test_what_is_kept_between_messages_is_gone_after_the_round(site):
    ask(site, until="mask")
    kept = site.rounds.kept["clients"][1]
    assert kept["last_session"] == 1 and kept["round"]["shares"]
    ask(site, 2, session=3)
    assert site.rounds.kept["clients"][1] == {"last_session": 3, "round": None}
