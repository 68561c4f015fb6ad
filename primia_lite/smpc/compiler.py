"""From a trained network to a program: traced, norms folded, scales chosen so that the range of each gate is kept."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from primia_lite.config import UserError
from primia_lite.models.networks import Copy, FixedNorm
from primia_lite.smpc.engines import Engine, Plain, Wire
from primia_lite.smpc.program import ACTIVATION, CAP, Program, Shapes, Step, Weights, run
from primia_lite.smpc.ring import Factor, decode, encode, product

LAST_CAP, FEWEST = 17, 6  # bits of the last layer's weights, whose products aren't cut, at most; of any layer at least
LIMIT, MARGIN = 2**30, 2  # a gate's range, and how far calibration stays below it
SAME, DEVIATION, FEW = 1e-3, 0.05, 8  # logits of program and network; in fixed point, of the largest; on how many films
WIDEST = 9216  # products summed: beyond, float64 would lose more than a last bit
NORMS = (nn.BatchNorm2d, FixedNorm)
PASSED = (nn.Identity, nn.Dropout, Copy)
FLATS = (torch.flatten, (1,)), ("flatten", (1,))
AVERAGES = (
    *((what, (axes,)) for what in (torch.mean, "mean") for axes in ((2, 3), (-2, -1))),
    *((F.adaptive_avg_pool2d, (side,)) for side in (1, (1, 1))),
)


def compile(network: nn.Module, films: torch.Tensor, description: dict | None = None) -> tuple[Program, Weights]:
    """A trained network as a public program, and its weights (weight, bias; float64), which stay with its owner.

    Parameters
    ----------
    films
        Public films in the form that the network takes, float32 [N, C, H, W]. They calibrate: a film whose values go
        beyond twice the largest that they reach at some layer may be diagnosed wrongly, and nobody would see it. The
        first of them are also computed in fixed point.
    description
        Shown to whoever wants a diagnosis: how films are prepared, and what logits mean.

    Raises
    ------
    UserError
        A layer has no gate (it is named), or its values leave no room for its weights' bits; the program makes other
        logits of the films than the network, or in fixed point such that are off by more than ``DEVIATION``.
    """
    steps, weights = _Tracing(network).result()
    shapes = {name: weight.shape for name, (weight, _) in weights.items()}
    bound = MARGIN * float(films.abs().max())
    n_classes = shapes[steps[-1].settings["name"]][0]
    draft = Program(tuple(films.shape[1:]), n_classes, steps, shapes, {}, bound, description or {})
    try:
        with torch.no_grad():
            wanted = network(films).double().numpy()
        _average(draft, weights)
    except UserError:
        raise
    except Exception as error:  # whatever a network raises of films that it doesn't take
        raise UserError(f"the network doesn't take films {draft.in_shape}: {error}") from error
    seen: dict[str, float] = {}

    def watch(step: Step, wire: Wire) -> None:
        seen[step.out] = float(np.abs(wire.share).max())
        if not math.isfinite(seen[step.out]):
            raise UserError(f"step {step.out!r} makes values that aren't finite of the calibration films")

    with torch.no_grad():
        logits = run(draft, Plain(weights), Wire(films.shape, films.double().numpy()), watch).share
        scale = np.abs(wanted).max()
        if wanted.shape != logits.shape or not np.abs(logits - wanted).max() <= SAME * scale:
            raise UserError("a program of the network's layers makes other logits than the network: write it plainly")
        scales = _Scales(steps, seen)
        program = replace(draft, steps=tuple(scales.steps), fractions=scales.fractions)
        few = films[:FEW].numpy()
        rounded = run(program, _Rounded(program, weights), Wire(few.shape, encode(few, ACTIVATION))).share
    off = np.abs(decode(rounded, program.logit_fraction) - logits[:FEW]).max()
    if off > DEVIATION * max(1, scale):
        raise UserError(
            f"in fixed point the logits are off by {off:.2g} on the calibration films, more than {DEVIATION} of the "
            "largest: values of very different sizes in one layer leave its weights few bits"
        )
    return Program.from_json(program.to_json()), weights


class _Rounded(Engine):
    """What two servers make of a film, with the errors of cuts and comparisons, computed by one in the clear."""

    def __init__(self, program: Program, weights: Weights) -> None:
        self.random, self.weights = np.random.default_rng(0), {}
        for name, bits in program.fractions.items():
            weight, bias = weights[name]
            self.weights[name] = Factor(encode(weight, bits)), encode(bias, ACTIVATION + bits)

    def conv(self, x, name, stride=1, padding=0, groups=1):
        weight, bias = self.weights[name]
        out = product(x.share, weight, stride, padding, groups)
        out += bias.reshape((1, -1) + (1,) * (out.ndim - 2))
        return Wire(out.shape, out)

    def select(self, y, gate):
        value = (y.share.view(np.int32).astype(np.int64) + ((1 << gate.shift) >> 1)) >> gate.shift
        terms, error = [], self.random.integers(-gate.half, gate.half or 1, y.shape)
        for threshold in gate.thresholds:
            terms.append(np.where(value - threshold + error >= 0, value - threshold, 0))
        out = terms[0] - sum(terms[1:]) if terms else value
        return Wire(y.shape, out.astype(np.uint32))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, *NORMS, *PASSED)) or super().is_leaf_module(module, name)


class _Tracing:
    """A network's modules and operations as steps, norms folded into the convolution before them."""

    def __init__(self, network: nn.Module) -> None:
        if network.training:
            raise UserError("the network is in training mode: call network.eval() first")
        self.network, self.steps, self.weights = network, [], {}
        self.modules = dict(network.named_modules())
        try:
            self.graph = _Tracer().trace(network)
        except Exception as error:  # whatever a network's code does with a tracing proxy
            raise UserError(f"the network can't be traced: {error}") from error
        self.wires: dict[fx.Node, str] = {}

    def result(self) -> tuple[tuple[Step, ...], Weights]:
        for node in self.graph.nodes:
            try:
                self._node(node)
            except UserError:
                raise
            except Exception as error:  # a number or a tuple where a tensor belongs, an argument by name
                raise UserError(f"layer {str(node.target)!r} can't be computed on shares: {error!r}") from error
        if not self.steps or self.steps[-1].op != "conv" or self.wires[node] != self.steps[-1].out:
            raise UserError("the network must end in a dense layer, and return what it makes")
        return tuple(_pool_first(self.steps)), self.weights

    def _node(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.wires[node] = "film"
        elif node.op == "call_module":
            self._module(node, self.modules[node.target], str(node.target))
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        elif node.op == "output":
            self._same(node)

    def _add(self, node: fx.Node, op: str, *inputs: fx.Node, **settings) -> None:
        self.steps.append(Step(op, node.name, tuple(self.wires[i] for i in inputs), settings))
        self.wires[node] = node.name

    def _same(self, node: fx.Node) -> None:
        self.wires[node] = self.wires[node.args[0]]

    def _refuse(self, name: str, what: object) -> None:
        raise UserError(f"layer {name!r} ({what}) has no gate for computing on shares")

    def _module(self, node: fx.Node, module: nn.Module, name: str) -> None:
        source = node.args[0]
        if isinstance(module, nn.Conv2d):
            self._convolution(node, module, name)
        elif isinstance(module, nn.Linear):
            self.weights[name] = _values(module.weight), _values(module.bias, len(module.weight))
            self._add(node, "conv", source, name=name)
        elif isinstance(module, NORMS):
            self._norm(node, module, name)
        elif isinstance(module, nn.ReLU6):
            self._add(node, "relu6", source)
        elif isinstance(module, nn.ReLU):
            self._add(node, "relu", source)
        elif isinstance(module, nn.MaxPool2d):
            if [_one(v) for v in (module.kernel_size, module.stride, module.padding, module.dilation)] != [3, 2, 1, 1]:
                self._refuse(name, "a maximum other than 3 x 3, stride 2, padding 1")
            self._add(node, "max_pool", source)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and _one(module.output_size) == 1:
            self._add(node, "sum_pool", source)  # a sum: :func:`_average` divides
        elif isinstance(module, nn.Flatten) and module.start_dim == 1:
            self._flatten(node)
        elif isinstance(module, PASSED):
            self._same(node)
        else:
            self._refuse(name, type(module).__name__)

    def _function(self, node: fx.Node) -> None:
        what = node.target
        if what in (operator.add, operator.iadd, torch.add, "add", "add_") and len(node.args) == 2:
            self._add(node, "add", *node.args)
        elif what in (torch.relu, F.relu, "relu"):
            self._add(node, "relu", node.args[0])
        elif what in (F.relu6,):
            self._add(node, "relu6", node.args[0])
        elif (what, node.args[1:]) in AVERAGES:
            self._add(node, "sum_pool", node.args[0])
        elif (what, node.args[1:]) in FLATS or (what == "view" and node.args[2:] == (-1,)):
            self._flatten(node)
        elif what != "size":  # the first argument of a view
            self._refuse(node.name, getattr(what, "__name__", what))

    def _convolution(self, node: fx.Node, module: nn.Conv2d, name: str) -> None:
        padding = getattr(module, "static_padding", None)  # of EfficientNet's convolutions, before their own
        if isinstance(padding, nn.ZeroPad2d) and any(padding.padding):
            left, right, top, bottom = padding.padding
            padded = f"{node.name}_padded"
            sides = {"left": left, "right": right, "top": top, "bottom": bottom}
            self.steps.append(Step("pad", padded, (self.wires[node.args[0]],), sides))
            source = padded
        else:
            source = self.wires[node.args[0]]
        square = all(len({*v}) == 1 for v in (module.kernel_size, module.stride, module.dilation))
        if (
            not square
            or _one(module.dilation) != 1
            or module.padding_mode != "zeros"
            or isinstance(module.padding, str)
        ):
            self._refuse(name, "a convolution that isn't square and plain")
        if math.prod(module.weight.shape[1:]) > WIDEST:
            self._refuse(name, f"a convolution over more than {WIDEST} products")
        self.weights[name] = _values(module.weight), _values(module.bias, module.out_channels)
        settings = {
            "name": name,
            "stride": _one(module.stride),
            "padding": _one(module.padding),
            "groups": module.groups,
        }
        self.steps.append(Step("conv", node.name, (source,), settings))
        self.wires[node] = node.name

    def _norm(self, node: fx.Node, module: nn.Module, name: str) -> None:
        """Folded into the convolution or dense layer before it, of which it must be the only reader."""
        source = node.args[0]
        before = next((s for s in self.steps if s.out == self.wires[source]), None)
        if before is None or before.op != "conv" or len(source.users) > 1:
            self._refuse(name, f"{type(module).__name__} that doesn't follow a convolution alone")
        if isinstance(module, FixedNorm):
            gain, shift = 1 / _values(module.scale), -_values(module.mean) / _values(module.scale)
        else:
            gain = _values(module.weight) / np.sqrt(_values(module.running_var) + module.eps)
            shift = _values(module.bias) - gain * _values(module.running_mean)
        weight, bias = self.weights[before.settings["name"]]
        gain, shift = gain.reshape(-1), shift.reshape(-1)
        folded = weight * gain.reshape((-1,) + (1,) * (weight.ndim - 1)), bias * gain + shift
        self.weights[before.settings["name"]] = folded
        self._same(node)

    def _flatten(self, node: fx.Node) -> None:
        source = self.wires[node.args[0]]
        if any(step.out == source and step.op == "sum_pool" for step in self.steps):
            self._same(node)
        else:
            self._add(node, "flatten", node.args[0])


def _one(value) -> int:
    """A side of something square."""
    return value if isinstance(value, int) else value[0]


def _values(parameter: torch.Tensor | None, n: int = 0) -> np.ndarray:
    return np.zeros(n) if parameter is None else parameter.detach().double().contiguous().numpy()


def _pool_first(steps: list[Step]) -> list[Step]:
    """ReLU and maximum commute: taken after the maximum, three ReLUs of four are saved."""
    steps = list(steps)
    readers: dict[str, int] = {}
    for step in steps:
        for name in step.inputs:
            readers[name] = readers.get(name, 0) + 1
    for i, (first, second) in enumerate(pairwise(steps)):
        alone = second.inputs == (first.out,) and readers[first.out] == 1
        if alone and first.op in ("relu", "relu6") and second.op == "max_pool":
            steps[i] = Step("max_pool", first.out, first.inputs)
            steps[i + 1] = Step(first.op, second.out, (first.out,))
    return steps


def _average(program: Program, weights: Weights) -> None:
    """Divide the weights of dense layers that read a sum over pixels by their number: steps add, networks average."""
    pixels, shapes = {}, {"film": program.in_shape}

    def watch(step: Step, wire: Wire) -> None:
        shapes[step.out] = wire.shape[1:]
        if step.op == "sum_pool":
            pixels[step.out] = math.prod(shapes[step.inputs[0]][1:])

    run(program, Shapes(program), Wire((1, *program.in_shape)), watch)
    for step in program.steps:
        for name in set(step.inputs) & set(pixels):
            if step.op != "conv":
                raise UserError(f"an average that {step.op!r} reads has no gate: a dense layer must follow it")
            weight, bias = weights[step.settings["name"]]
            weights[step.settings["name"]] = weight / pixels[name], bias


class _Scales:
    """Steps with the bits behind the point kept in order: products are cut before they are factors, summands lifted to
    one scale. Layers whose products are added share their ``fractions``."""

    def __init__(self, steps: tuple[Step, ...], seen: dict[str, float]) -> None:
        self.seen, self.bits, self.cuts, self.steps = seen, {"film": 0}, {}, []
        self.fractions = self._fractions(steps)
        for step in steps:
            self._place(step)

    def _fractions(self, steps: tuple[Step, ...]) -> dict[str, int]:
        group: dict[str, set[str]] = {}  # of a wire at the scale of products: the layers that share its scale
        for step in steps:
            sources = [group[name] for name in step.inputs if name in group]
            if step.op == "conv":
                group[step.out] = {step.settings["name"]}
            elif step.op in ("add", "max_pool", "pad", "flatten") and sources:
                together = set().union(*sources)
                group = {wire: together if layers & together else layers for wire, layers in group.items()}
                group[step.out] = together
        largest: dict[str, float] = {}
        for wire, layers in group.items():
            for name in layers:
                largest[name] = max(largest.get(name, 0.0), self.seen[wire])
        caps = {name: CAP for name in largest} | {steps[-1].settings["name"]: LAST_CAP}
        return {name: self._fit(value, caps[name], f"layer {name!r}") for name, value in largest.items()}

    def _fit(self, value: float, cap: int, what: str) -> int:
        bits = min(cap, math.floor(math.log2(LIMIT / (MARGIN * max(value, 1e-9)))) - ACTIVATION)
        if bits < FEWEST:
            raise UserError(
                f"{what} reaches {value:.0f} on the calibration films, which leaves {bits} bits for its weights: "
                f"scale the network's layers down (at least {FEWEST} bits are needed)"
            )
        return bits

    def _step(self, op: str, out: str, inputs: tuple[str, ...], bits: int, **settings) -> str:
        self.steps.append(Step(op, out, inputs, settings))
        self.bits[out] = bits
        return out

    def _cut(self, wire: str) -> str:
        """The wire at the scale of activations."""
        if not self.bits[wire]:
            return wire
        if wire not in self.cuts:
            self.cuts[wire] = self._step("cut", f"{wire}_cut", (wire,), 0, shift=self.bits[wire])
        return self.cuts[wire]

    def _lift(self, wire: str, bits: int) -> str:
        more = bits - self.bits[wire]
        return self._step("lift", f"{wire}_lifted_{len(self.steps)}", (wire,), bits, by=more) if more else wire

    def _place(self, step: Step) -> None:
        inputs, settings = list(step.inputs), step.settings
        if step.op == "conv":
            inputs, bits = [self._cut(inputs[0])], self.fractions[settings["name"]]
        elif step.op in ("relu", "relu6", "max_pool"):
            if not self.bits[inputs[0]]:
                inputs = [
                    self._lift(inputs[0], self._fit(self.seen[step.inputs[0]], CAP, f"the input of {step.out!r}"))
                ]
            bits = self.bits[inputs[0]]
            if step.op != "max_pool":
                settings, bits = {"shift": bits}, 0
        elif step.op == "sum_pool":
            inputs, bits = [self._cut(inputs[0])], 0
        elif step.op == "add":
            if not all(self.bits[name] for name in inputs):
                inputs = [self.cuts.get(name, name) for name in inputs]
            bits = max(self.bits[name] for name in inputs)
            inputs = [self._lift(name, bits) for name in inputs]
        else:
            bits = self.bits[inputs[0]]
        self._step(step.op, step.out, tuple(inputs), bits, **settings)
