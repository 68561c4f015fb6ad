"""A network as a program of steps that engines run: what is public of it, apart from its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from primia_lite.config import UserError
from primia_lite.smpc.engines import Engine, Wire, product_shape
from primia_lite.smpc.gates import Gate

ACTIVATION = 10  # bits behind the point of activations; products have those of the weights more
MOST = 2**24  # of numbers in a film, and of a weight's side
CAP = 14  # bits of weights, at most


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
            shapes = {name: tuple(map(int, shape)) for name, shape in content.pop("shapes").items()}
            program = cls(tuple(content.pop("in_shape")), steps=steps, shapes=shapes, **content)
            program.check_numbers()
            run(program, Shapes(program), Wire((1, *program.in_shape)))
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"not a program: {type(error).__name__}: {error}") from error
        return program

    def check_numbers(self) -> None:
        """ValueError for numbers that would take all memory, or that no gate has."""
        settings = [value for step in self.steps for value in step.settings.values() if type(value) is int]
        numbers = [*self.in_shape, self.n_classes, *(n for shape in self.shapes.values() for n in shape)]
        if not all(type(n) is int and 0 < n <= MOST for n in numbers) or np.prod(self.in_shape, dtype=float) > MOST:
            raise ValueError("a shape is out of bounds")
        if not all(0 <= value <= 512 for value in settings) or not all(0 <= f <= 20 for f in self.fractions.values()):
            raise ValueError("a setting is out of bounds")

    @property
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
    """Runs a program on shapes alone, and checks that they fit."""

    def __init__(self, program: Program) -> None:
        self.shapes = program.shapes

    def conv(self, x, name, stride=1, padding=0, groups=1):
        weight = self.shapes[name]
        if x.shape[1] != weight[1] * groups or (len(weight) == 2) != (len(x.shape) == 2):
            raise ValueError(f"layer {name} has a weight {weight} for an input {x.shape}")
        return Wire(product_shape(x.shape, weight, stride, padding))

    def select(self, y, gate):
        return Wire(y.shape)


Weights = dict[str, tuple[np.ndarray, np.ndarray]]
