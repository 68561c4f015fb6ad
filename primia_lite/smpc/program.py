"""A network as a program of steps that engines run: what is public of it, apart from its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from primia_lite.config import UserError
from primia_lite.smpc import dcf
from primia_lite.smpc.engines import Engine, Wire, product_shape
from primia_lite.smpc.gates import Gate
from primia_lite.smpc.ring import RING_BITS

ACTIVATION = 10  # bits behind the point of activations; products have those of the weights more
CAP = 14  # bits of weights, at most
MAX_VALUES, MAX_WEIGHTS, MAX_STEPS = 1 << 24, 1 << 28, 2000  # of a film between layers; of a model


@dataclass(frozen=True)
class Step:
    """``op``, a method of :class:`~primia_lite.smpc.engines.Engine` or a gate's name, makes wire ``out`` from
    ``inputs``; ``settings`` are its arguments."""

    op: str
    out: str
    inputs: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """What both servers, the dealer and the film's owner know of a network.

    ``shapes``: of weights by layer; ``fractions``: their bits behind the point; ``input_bound``: what no pixel of a
    film may pass; ``description``: how films are prepared, and what logits mean (``ModelCard.describe``).
    """

    in_shape: tuple[int, int, int]
    n_classes: int
    steps: tuple[Step, ...]
    shapes: dict[str, tuple[int, ...]]
    fractions: dict[str, int]
    input_bound: float
    description: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Raises
        ------
        UserError
            The text isn't a program that :func:`run` could run."""
        try:
            content = json.loads(text)
            steps = tuple(
                Step(s["op"], s["out"], tuple(s["inputs"]), dict(s["settings"])) for s in content.pop("steps")
            )
            shapes = {name: tuple(shape) for name, shape in content.pop("shapes").items()}
            program = cls(tuple(content.pop("in_shape")), steps=steps, shapes=shapes, **content)
            program._check()
        except Exception as error:  # anybody may have written it
            raise UserError(f"not a program: {type(error).__name__}: {error}") from error
        return program

    def _check(self) -> None:
        """Raises something unless engines can run it within bounds."""
        sides = [self.n_classes, *self.in_shape, *(side for shape in self.shapes.values() for side in shape)]
        numbers = [value for step in self.steps for name, value in step.settings.items() if name != "name"]
        sound = (
            all(type(n) is int and 0 < n <= MAX_VALUES for n in sides)
            and all(type(n) is int and 0 <= n < 1 << 10 for n in numbers)
            and all(type(n) is int and 0 <= n < RING_BITS for n in self.fractions.values())
            and len(self.in_shape) == 3 and math.prod(self.in_shape) <= MAX_VALUES and len(self.steps) <= MAX_STEPS
            and all(len(shape) in (2, 4) for shape in self.shapes.values()) and set(self.shapes) == set(self.fractions)
            and sum(map(math.prod, self.shapes.values())) <= MAX_WEIGHTS
            and 0 < self.input_bound < 1 << 20 and isinstance(self.description, dict)
            and self.steps[-1].op == "conv" and self.key_bytes and self.digest
        )  # fmt: skip
        if not sound:
            raise ValueError("a number in it is out of bounds")

    @cached_property
    def key_bytes(self) -> tuple[int, int]:
        """Of a key for one film, by server, without its header."""
        engine = Shapes(self)
        out = run(self, engine, Wire((1, *self.in_shape)), engine.check)
        if out.shape != (1, self.n_classes):
            raise ValueError(f"it makes {out.shape} of a film, not logits")
        return engine.key_bytes[0], engine.key_bytes[1]

    @cached_property
    def digest(self) -> str:
        """Names the program: parties that differ in it refuse one another."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def logit_fraction(self) -> int:
        return ACTIVATION + self.fractions[self.steps[-1].settings["name"]]


GATES = {
    "relu": lambda shift=CAP: Gate(shift),
    "relu6": lambda shift=CAP: Gate(shift, (0, 6 << ACTIVATION)),
    "cut": lambda shift=CAP: Gate(shift, ()),
}
STEPS = ("conv", "add", "lift", "pad", "flatten", "sum_pool", "max_pool", *GATES)


def run(
    program: Program, engine: Engine, film: Wire, watch: Callable[[Step, Wire], None] = lambda step, wire: None
) -> Wire:
    """The logits' wire. ``watch`` is shown what each step makes."""
    wires = {"film": film}
    last_use = {name: number for number, step in enumerate(program.steps) for name in step.inputs}
    out = film
    for number, step in enumerate(program.steps):
        if step.op not in STEPS:
            raise UserError(f"no gate for {step.op!r}")
        inputs, settings = [wires[name] for name in step.inputs], dict(step.settings)
        if step.op in GATES:
            out = engine.select(*inputs, GATES[step.op](**settings))
        else:
            out = getattr(engine, step.op)(*inputs, **settings)
        wires[step.out] = out
        watch(step, out)
        for name in step.inputs:  # memory: what no later step reads
            if last_use[name] == number:
                wires.pop(name, None)
    return out


class Shapes(Engine):
    """Runs a program on shapes alone, checks that they fit, and counts the bytes of a key for each server."""

    def __init__(self, program: Program) -> None:
        self.shapes, self.key_bytes = program.shapes, [0, 0]

    def conv(self, x, name, stride=1, padding=0, groups=1):
        weight = self.shapes[name]
        if x.shape[1] != weight[1] * groups or weight[0] % groups or len(weight) != len(x.shape):
            raise ValueError(f"layer {name} has a weight {weight} for an input {x.shape}")
        out = Wire(product_shape(x.shape, weight, stride, padding))
        self.key_bytes[1] += 4 * out.size
        return out

    def select(self, y, gate):
        if gate.shift > 16:
            raise ValueError(f"a gate can't cut {gate.shift} bits")
        words = dcf.key_bytes(gate.bits) * y.size if gate.thresholds else 0
        self.key_bytes = [self.key_bytes[0] + words, self.key_bytes[1] + words + 4 * gate.columns * y.size]
        return Wire(y.shape)

    def add(self, a, b):
        if a.shape != b.shape:
            raise ValueError(f"{a.shape} can't be added to {b.shape}")
        return Wire(a.shape)

    def pad(self, x, left, right, top, bottom):
        return Wire((*x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right))

    @staticmethod
    def check(step: Step, wire: Wire) -> None:
        if min(wire.shape) < 1 or math.prod(wire.shape) > MAX_VALUES:
            raise ValueError(f"step {step.out!r} makes values {wire.shape}")


Weights = dict[str, tuple[np.ndarray, np.ndarray]]
