"""``primia-lite smpc``: servers as processes, which may be killed at any time."""

import re

import numpy as np
import pytest
import torch

from primia_lite import smpc
from primia_lite.apps import cli
from primia_lite.apps.smpc import make_parties, running
from primia_lite.encrypted.model_card import ModelCard
from primia_lite.models.networks import convnet
from primia_lite.smpc.connection import PeerError


@pytest.fixture
def card():
    torch.manual_seed(0)
    network = convnet(3, (1, 32, 32))
    return ModelCard("convnet", {}, ("normal", "bacterial", "viral"), 32, (1, 32, 32), network.state_dict(), "nothing")


def test_by_the_commands_and_after_a_kill(card, tmp_path, capsys):
    """A key that a killed server had taken is lost, and the next film gets the next one, with the right logits."""
    from PIL import Image

    make_parties(tmp_path)
    card.save(tmp_path / "model.pt")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(tmp_path / "film.png")
    film = np.random.default_rng(1).normal(size=(1, 1, 32, 32)).clip(-2, 2)
    party = smpc.Party(tmp_path / "film")

    def command(*words):
        assert cli.main(["smpc", *map(str, words)]) == 0
        return capsys.readouterr().out

    with running(tmp_path) as texts:
        command("share", tmp_path / "model", tmp_path / "model.pt", "--servers", *texts)
        command("deal", tmp_path / "dealer", tmp_path / "model" / "program.json", "--films", 6, "--servers", *texts)
        shown = command("diagnose", tmp_path / "film", tmp_path / "film.png", "--servers", *texts)
        assert re.search(r"normal +[\d.]+%", shown) and "key 0" in shown and "7 rounds" in shown
    with running(tmp_path) as texts:  # server 1 started anew, and server 0: what they had prepared is lost
        addresses = [(host, int(port)) for host, port in (text.split(":") for text in texts)]
        found = smpc.diagnose(film, party, addresses)
        assert found.key > 0
        with torch.no_grad():
            want = card.network()(torch.from_numpy(film).float()).numpy()
        assert np.abs(found.logits - want).max() < 0.005
    with pytest.raises(PeerError, match="reached"):
        smpc.diagnose(film, party, addresses)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["server", "nowhere", "--listen", "127.0.0.1:0"], "identity"),
        (["server", "nowhere", "--listen", "127.0.0.1:0", "--other", "here"], "host:port"),
        (["share", "nowhere", "no.pt", "--servers", "a:1", "b:2"], "no.pt"),
        (["deal", "nowhere", "no.json", "--servers", "a:1", "b:2"], "no.json"),
        (["diagnose", "nowhere", "no.png", "--servers", "a:1", "b:2"], "no.png"),
        (["identity", "nowhere", "king"], "king"),
    ],
)
def test_wrong_use_is_one_sentence(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["smpc", *words]) == 2
    assert says in capsys.readouterr().err
