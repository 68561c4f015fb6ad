"""Each gate through dealer and both servers, at the edges of its range; and a network's steps against plain float64."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from primia_lite import smpc
from primia_lite.config import UserError
from primia_lite.models.networks import FixedNorm
from primia_lite.smpc.engines import Plain, Wire
from primia_lite.smpc.gates import Gate
from primia_lite.smpc.program import Program, run
from primia_lite.smpc.ring import share
from primia_lite.smpc.simulation import simulate, simulate_film

SIX = 6 << 10


def through(gate, y):
    shares = share(y.view(np.uint32))

    def work(engine, b):
        return engine.select(Wire(y.shape, None if b is None else shares[b]), gate)

    found = simulate(work)
    return (found.shares[0] + found.shares[1]).view(np.int32), found


@pytest.mark.parametrize(
    ("gate", "low", "high", "units"),
    [
        (Gate(14, ()), -(2**30), 2**30 - 2**14, 1.5),  # three cuts lose up to a unit each, and half a one is added
        (Gate(14), -(2**30), 2**30 - 2**14, 4),
        (Gate(12), -(2**30), 2**30 - 2**12, 10),
        (Gate(14, (0, SIX)), -(2**30), 2**30 - 2**14, 4),
        (Gate(0), -(2**31) + 2**16, 2**31 - 2**16, 2**15),
    ],
)
def test_a_gate_keeps_its_bound_over_its_whole_range(gate, low, high, units):
    """``units``: of the last bit after the cut; a comparison may err for values nearer to the threshold than its last
    bit, by no more than that."""
    rng = np.random.default_rng(0)
    y = np.concatenate(
        [
            rng.integers(low, high, 20_000),
            rng.integers(-(2**18), 2**18, 20_000),
            [low, high, low + 1, high - 1, 0, 1, -1],
        ]
    ).astype(np.int32)
    got, _ = through(gate, y)
    exact = y / 2.0**gate.shift
    if gate.thresholds:
        exact = np.clip(exact, 0, SIX if len(gate.thresholds) == 2 else None)
    assert np.abs(got - exact).max() <= units
    assert abs((got - exact).mean()) < max(0.05, units / 100)  # cutting has no bias


@pytest.mark.parametrize("gate", [Gate(14), Gate(14, (0, SIX)), Gate(0)])
def test_what_is_opened_is_uniform_whatever_the_value(gate):
    """χ² over the top four bits of what server 0 receives, and over the bits of comparisons."""
    for value in (-(2**20), 0, 2**28):
        _, found = through(gate, np.full(16_000, value, np.int32))
        words = np.frombuffer(found.opened[0][0][1][: 2 * 16_000], np.uint16)
        counts = np.bincount(words >> np.uint16(12), minlength=16)
        assert ((counts - 1000) ** 2 / 1000).sum() < 60
        own, other = (np.unpackbits(np.frombuffer(part, np.uint8)) for part in found.opened[0][1])
        opened = own ^ other
        assert abs(opened.mean() - 0.5) < 6 * 0.5 / len(opened) ** 0.5


def small_resnet():
    from monai.networks.nets.resnet import ResNet, ResNetBlock

    torch.manual_seed(1)
    network = ResNet(ResNetBlock, [1, 1, 1, 1], [8, 16, 16, 32], 2, 1, num_classes=3, conv1_t_stride=2)
    films = torch.randn(8, 1, 48, 48)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(films)
    return network.eval(), films


def small_mobile():
    """Depthwise convolutions, ReLU6, a residual of projections."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.depth = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
            self.project, self.act = nn.Conv2d(24, 8, 1), nn.ReLU6()

        def forward(self, x):
            return x + self.project(self.act(self.depth(self.act(self.expand(x)))))

    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), Block(), Block(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return network.eval(), torch.randn(8, 1, 32, 32)


def dense_with_constants():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), FixedNorm(32), nn.ReLU(), nn.Linear(32, 2))
    network[2].mean.copy_(torch.randn(32))
    network[2].scale.copy_(torch.rand(32) + 0.5)
    return network.eval(), torch.randn(8, 1, 16, 16)


@pytest.mark.parametrize("make", [small_resnet, small_mobile, dense_with_constants])
def test_a_network_is_the_same_in_torch_as_a_program_and_on_shares(make):
    network, films = make()
    program, weights = smpc.compile(network, films)
    program = Program.from_json(program.to_json())
    with torch.no_grad():
        want = network(films[:2]).double().numpy()
    plain = run(program, Plain(weights), Wire(films[:2].shape, films[:2].double().numpy())).share
    assert np.abs(plain - want).max() < 1e-5
    assert np.abs(simulate_film(program, weights, films[:2].numpy())[0] - want).max() < 0.02


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        ([nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(784, 2)], "GroupNorm"),
        ([nn.Flatten(), nn.Linear(256, 4), nn.Tanh(), nn.Linear(4, 2)], "Tanh"),
        ([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2)], "BatchNorm2d"),
        ([nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 2)], "maximum"),
        ([nn.Conv2d(1, 4, 3, dilation=2), nn.Flatten(), nn.Linear(576, 2)], "plain"),
        ([nn.Flatten(), nn.Linear(256, 2), nn.ReLU()], "dense"),
        ([nn.Conv2d(1, 4, 3, padding=(1, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)], "logits"),
        ([nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)], "logits"),
        ([nn.MaxPool2d((3, 1), 2, (1, 0)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)], "logits|maximum"),
        ([nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(8, 2)], "take"),
    ],
)
def test_a_layer_without_a_gate_is_named(layers, word):
    with pytest.raises(UserError, match=word):
        smpc.compile(nn.Sequential(*layers).eval(), torch.randn(4, 1, 16, 16))


class Odd(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.norm.weight.data.fill_(3.0)
        self.flat, self.head, self.more = nn.Flatten(), nn.Linear(256, 2), nn.Linear(256, 2)
        self.what = forward

    def forward(self, x):
        return self.what(self, x)


def with_an_unused_head(net, x):
    out = net.head(net.flat(x))
    net.more(net.flat(x))
    return out


@pytest.mark.parametrize(
    ("forward", "word"),
    [
        (lambda net, x: net.head(net.flat(torch.add(x, net.conv(x), alpha=3))), "logits"),
        (lambda net, x: net.head(net.flat(net.conv(net.norm(net.conv(x))))), "logits"),
        (lambda net, x: net.head(net.flat(x + 1.0)), "add"),
        (lambda net, x: (net.head(net.flat(x)), x), "output"),
        (lambda net, x: {"logits": net.head(net.flat(x))}, "output"),
        (with_an_unused_head, "dense"),
    ],
)
def test_what_would_be_another_network_is_refused(forward, word):
    with pytest.raises(UserError, match=word):
        smpc.compile(Odd(forward).eval(), torch.randn(4, 1, 16, 16))


def test_logits_that_fixed_point_would_spoil_are_refused():
    """One unit of a thousand leaves the others few bits."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    torch.manual_seed(5)
    network[1].bias.data[0], network[3].weight.data[:, 0] = 7500.0, 0.0
    with pytest.raises(UserError, match="fixed point"):
        smpc.compile(network, torch.randn(8, 1, 16, 16))


def test_values_beyond_every_range_are_refused_and_large_ones_get_fewer_bits():
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    films = torch.randn(8, 1, 16, 16)
    ordinary = smpc.compile(network, films)[0].fractions["1"]
    network[1].weight.data *= 100
    assert smpc.compile(network, films)[0].fractions["1"] < ordinary
    network[1].weight.data *= 1000
    with pytest.raises(UserError, match="range|bits"):
        smpc.compile(network, films)
    network[1].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="finite"):
        smpc.compile(network, films)


def test_training_mode_and_films_of_another_size_are_refused(small):
    network, _, _, films = small
    with pytest.raises(UserError, match="eval"):
        smpc.compile(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train(), films)
    with pytest.raises(UserError, match="take"):
        smpc.compile(network, torch.randn(4, 1, 28, 28))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"steps": 3}', '{"steps": [{"op": "conv"}]}'])
def test_what_is_no_program_is_refused(text):
    with pytest.raises(UserError, match="program"):
        Program.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["steps"][0]["settings"].update(stride=0),
        lambda p: p["steps"][0]["settings"].update(groups=3),
        lambda p: p["steps"][0]["settings"].update(padding=1 << 30),
        lambda p: p["steps"].insert(0, {"op": "lift", "out": "film", "inputs": ["film"], "settings": {"by": -1}}),
        lambda p: p["steps"].insert(0, {"op": "cut", "out": "film", "inputs": ["film"], "settings": {"shift": 40}}),
        lambda p: p["steps"].insert(
            0, {"op": "pad", "out": "film", "inputs": ["film"],
                "settings": {"left": 900, "right": 900, "top": 1 << 20, "bottom": 1 << 20}},
        ),
        lambda p: p["steps"].extend(p["steps"][:1] * 3000),
        lambda p: p.update(in_shape=[1, 1 << 20, 1 << 20]),
        lambda p: p.update(in_shape=[1, 32]),
        lambda p: p.update(n_classes=4),
        lambda p: p.update(n_classes="3"),
        lambda p: p.update(input_bound=float("nan")),
        lambda p: p.update(input_bound="much"),
        lambda p: p.update(fractions={}),
        lambda p: p["fractions"].update({next(iter(p["fractions"])): 4000}),
        lambda p: p.update(description=7),
        lambda p: p["shapes"].update(more=[1 << 20, 1 << 20]),
        lambda p: p["shapes"].update(more=[True, -3]),
    ],
)  # fmt: skip
def test_a_program_out_of_bounds_is_refused(small, change):
    content = json.loads(small[1].to_json())
    change(content)
    with pytest.raises(UserError, match="program"):
        Program.from_json(json.dumps(content))


def test_a_program_nested_without_end_is_refused():
    with pytest.raises(UserError, match="program"):
        Program.from_json("[" * 200_000)


def test_a_key_has_the_size_that_its_program_says(small):
    _, program, weights, films = small
    assert simulate_film(program, weights, films[:2].numpy())[1].key_bytes == tuple(2 * n for n in program.key_bytes)
