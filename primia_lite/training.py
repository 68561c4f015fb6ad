"""What one party does with its own films: mini-batches, augmentation, the local loop, and scoring a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from primia_lite import models
from primia_lite.config import TrainingError, UserError
from primia_lite.data import augmentation as aug
from primia_lite.data.films import Films
from primia_lite.privacy.dpsgd import ClippedSum, PhysicalBatch, PoissonBatch, Privacy, clipped_step, poisson_batches
from primia_lite.privacy.rng import SecureGenerator


@dataclass(frozen=True)
class Training:
    """How a model is trained, the same at every hospital.

    Attributes
    ----------
    model : ``litenet``, ``scatternet``, ``ckksnet`` or ``resnet18``
    learning_rate, momentum, weight_decay : of local SGD
    sample_rate : q in (0, 1]; a step sees q times the declared number of patients (or films, where they are the unit)
        on average under DP, and exactly q times the films otherwise
    local_steps : steps between two synchronisations; or
    local_epochs : passes over the films between two synchronisations (one epoch is round(1 / q) steps)
    label_smoothing : share of each label that is spread over all classes (Szegedy et al. 2016)
    class_weights : None, ``"balanced"`` (from the hospital's own counts: not with DP), or one public number per class
    max_grad_norm : without DP, clips each patient's gradient to this L2 norm and samples patients as DP-SGD does, but
        adds no noise: what clipping alone does to training. It protects nobody. With DP ``Privacy`` says it
    augmentation : any of ``flip``, ``shift``, ``jitter``, ``stretch`` (see :mod:`primia_lite.data.augmentation`) and
        ``mixup`` (Zhang et al. 2018; not with DP: clipping doesn't bound what one film adds to blended ones)
    model_options : the network's own, by name (see :mod:`primia_lite.models.networks`)
    """

    model: str = "litenet"
    n_classes: int = 3
    learning_rate: float = 1.0
    sample_rate: float = 0.25
    local_steps: int | None = 1
    local_epochs: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    class_weights: str | tuple[float, ...] | None = None
    max_grad_norm: float | None = None
    augmentation: tuple[str, ...] = ()
    model_options: dict = field(default_factory=dict)

    def __post_init__(self):
        models.check_options(self.model, self.model_options)
        if not 0 < self.sample_rate <= 1:
            raise UserError(f"sample_rate is {self.sample_rate}: it must be in (0, 1]")
        if (self.local_steps is None) == (self.local_epochs is None):
            raise UserError("give either local_steps or local_epochs, and leave the other None")
        if self.steps_per_round < 1:
            raise UserError("local_steps or local_epochs must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}: it must be in [0, 1)")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < float("inf"):
            raise UserError(f"max_grad_norm is {self.max_grad_norm}: leave it out, or take a number above 0")
        if unknown := set(self.augmentation) - set(aug.AUGMENTATIONS):
            raise UserError(f"unknown augmentation {sorted(unknown)}: choose from {', '.join(aug.AUGMENTATIONS)}")
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise UserError(f"class_weights is {self.class_weights!r}: use None, 'balanced', or one number per class")
        if isinstance(self.class_weights, (tuple, list)) and len(self.class_weights) != self.n_classes:
            raise UserError(f"class_weights has {len(self.class_weights)} numbers for {self.n_classes} classes")

    @property
    def steps_per_round(self) -> int:
        if self.local_epochs is None:
            return self.local_steps
        return self.local_epochs * max(1, round(1 / self.sample_rate))

    def changed(self, **changes) -> Training:
        return replace(self, **changes)

    def as_dict(self) -> dict:
        return asdict(self)


def check_options(training: Training, privacy: Privacy | None) -> None:
    """Raise UserError for options that contradict DP, clipping, or shared noise."""
    clipped = privacy or training.max_grad_norm
    if privacy and training.max_grad_norm:
        raise UserError("with DP the clip is Privacy's max_grad_norm: leave out that of Training")
    if clipped and "mixup" in training.augmentation:
        raise UserError("mixup blends films, so clipping no longer bounds what one film adds: leave it out with DP")
    if clipped and training.class_weights == "balanced":
        raise UserError("class_weights='balanced' counts private labels: with DP give one public number per class")
    if privacy and privacy.shared and (training.steps_per_round != 1 or training.momentum):
        raise UserError(
            f"with shared noise a round is one step of the server: set local_steps=1 (now {training.steps_per_round}) "
            f"and momentum=0 (now {training.momentum:g}; the schedule's server_momentum does the same)"
        )


def train(
    model: nn.Module,
    films: Films,
    training: Training,
    privacy: Privacy | None,
    rng: SecureGenerator,
    expected_batch: float,
) -> list[float]:
    """Take ``training.steps_per_round`` steps of SGD, or of DP-SGD, in place.

    ``expected_batch`` is the public denominator of a step's gradient under DP: sample rate times the declared number of
    units. Gives the mean loss of each step (nan for an empty batch), which is private: it stays with the hospital.

    Raises
    ------
    TrainingError
        The loss is no longer finite.
    """
    check_options(training, privacy)
    weight, shuffle, n_steps = _class_weights(training, films.labels), _shuffle(rng), training.steps_per_round
    model.train()
    optimizer = SGD(model, training)
    if privacy or training.max_grad_norm:
        unit, bound = (privacy.unit, privacy.max_grad_norm) if privacy else ("patient", training.max_grad_norm)
        noise = partial(privacy.add_noise, rng=rng.child("noise")) if privacy else None
        clipped, n_units = ClippedSum(model, bound, unit, films), len(films.units(unit))
        expected = expected_batch if privacy else training.sample_rate * n_units
        batches = poisson_batches(n_units, training.sample_rate, n_steps, rng.child("sampling"))

        def step(batch: PoissonBatch) -> float:
            parts = private_rows(films, batch, training, unit, weight, shuffle)
            return clipped_step(clipped, optimizer, batch, parts, expected, noise)
    else:
        batches = shuffled_batches(len(films), training.sample_rate, n_steps, shuffle)

        def step(batch: torch.Tensor) -> float:
            return _plain_step(model, optimizer, batch, _loss_function(films, batch, training, weight, shuffle))

    losses = []
    for number, batch in enumerate(batches):
        where = f"at local step {number + 1} of {n_steps}"
        with _refusing(where, training):
            losses.append(step(batch))
        if len(batch) and not np.isfinite(losses[-1]):
            raise TrainingError(f"the loss is {losses[-1]} {where}: {_remedy(training)}")
    return losses


def private_share(
    model: nn.Module, films: Films, training: Training, privacy: Privacy, rng: SecureGenerator, declared: int
) -> dict[str, torch.Tensor]:
    """A hospital's part of a step with shared noise, int64 by name: :meth:`primia_lite.privacy.shared.Quantizer.share`.

    ``declared`` is its number of units. The model isn't changed, weight decay is the server's matter, and no loss is
    given: it is private.

    Raises
    ------
    TrainingError
        A gradient isn't finite.
    """
    check_options(training, privacy)
    weight, unit = _class_weights(training, films.labels), privacy.unit
    model.train()
    (batch,) = poisson_batches(len(films.units(unit)), training.sample_rate, 1, rng.child("sampling"))
    with _refusing("in this round", training):
        parts = private_rows(films, batch, training, unit, weight, _shuffle(rng))
        total, _ = ClippedSum(model, privacy.max_grad_norm, unit, films)(batch, parts)
        return privacy.quantizer.share(total, declared, rng.child("noise"))


def _shuffle(rng: SecureGenerator) -> torch.Generator:
    return torch.Generator().manual_seed(rng.child("augmentation").seed())


@contextmanager
def _refusing(where: str, training: Training) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        why = f"{error} {where}: the step is refused, its budget stays spent; {_remedy(training)}"
        raise TrainingError(why) from error


def _remedy(training: Training) -> str:
    return f"lower learning_rate (now {training.learning_rate}), or check the films for values that aren't finite"


PART_FILMS = 256  # at once, in networks that are trained whole
CACHE_BYTES = 8 * 2**20  # of films at once before a linear head: what the cache holds, as rows are read twice


class SGD:
    """The step of torch.optim.SGD, to the bit. Theirs brings a compiler along: 2 s for each process that trains."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        self.parameters, self.training = [p for p in model.parameters() if p.requires_grad], training
        self.velocity: dict[torch.Tensor, torch.Tensor] = {}

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            if self.training.weight_decay:
                gradient = gradient.add(parameter, alpha=self.training.weight_decay)
            if self.training.momentum:
                before = self.velocity.get(parameter)
                gradient = gradient.clone() if before is None else before.mul_(self.training.momentum).add_(gradient)
                self.velocity[parameter] = gradient
            parameter.add_(gradient, alpha=-self.training.learning_rate)


def _plain_step(model: nn.Module, optimizer: SGD, index: torch.Tensor, losses_of) -> float:
    """One step of SGD on the mean loss of a batch."""
    optimizer.zero_grad()
    total = 0.0
    for part in index.split(PART_FILMS):
        loss = losses_of(model, part).sum() / len(index)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    return total


def shuffled_batches(n: int, sample_rate: float, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of round(q n) films, each pass over all films in a new order. Not for DP: its accounting fails.

    Where a pass doesn't divide into batches, one batch ends a pass and begins the next, and may hold a film twice.
    """
    size = max(1, round(n * sample_rate))
    order = torch.randperm(n, generator=generator)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        batch, order = order[:size], order[size:]
        yield batch


def _class_weights(training: Training, labels: torch.Tensor) -> torch.Tensor | None:
    if training.class_weights is None:
        return None
    if training.class_weights == "balanced":
        counts = torch.bincount(labels, minlength=training.n_classes).clamp(min=1)
        return len(labels) / (training.n_classes * counts.float())
    return torch.tensor(training.class_weights, dtype=torch.float32)


def private_rows(
    films: Films, batch: PoissonBatch, training: Training, unit: str, weight, generator: torch.Generator
) -> Iterator[PhysicalBatch]:
    """The films of the units of a batch, in parts of whole units.

    All cached views of a film count (augmentation multiplicity, De et al. 2022), as parts of its unit's one gradient.
    """
    owned, views = films.units(unit), films.inputs.shape[1]
    index, films_of = owned.films(batch.units), owned.count[batch.units]
    count = films_of * views
    target = _targets(films.labels[index], training, weight) / count.repeat_interleave(films_of)[:, None]
    target = target.repeat_interleave(views, 0)
    limit = PART_FILMS if films.inputs.dim() == 5 else CACHE_BYTES // films.inputs[0].nbytes
    for units, some in _split_units(films_of, limit):
        inputs = augment(films, index[some], training.augmentation, generator, all_views=True)  # [B, V, ...]
        rows = slice(some.start * views, some.stop * views)
        yield PhysicalBatch(inputs.flatten(0, 1), batch.units[units], count[units], target[rows])


def _targets(labels: torch.Tensor, training: Training, weight: torch.Tensor | None) -> torch.Tensor:
    """What cross-entropy compares with, [B, K]: smoothed labels times class weights, as torch's own has them."""
    k, smoothing = training.n_classes, training.label_smoothing
    weight = torch.ones(k) if weight is None else weight
    return (1 - smoothing) * weight * F.one_hot(labels, k) + smoothing / k * weight


def _split_units(films_of: torch.Tensor, limit: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a batch as its units and their films: at most ``limit`` films, or one unit that has more."""
    ends = np.append(0, films_of.numpy().cumsum())
    first = 0
    while first < len(films_of):
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + limit, "right")) - 1)
        yield slice(first, last), slice(int(ends[first]), int(ends[last]))
        first = last


def _loss_function(films, index, training, weight, generator):
    """Cross-entropy [B] of films of a batch, as a function of model and part, one view drawn at random for each.

    Mixing is drawn here, once for the whole batch.
    """
    mixed = "mixup" in training.augmentation and len(index) > 1
    if mixed:
        share = float(np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator))).beta(0.2, 0.2))
        others = index[torch.randperm(len(index), generator=generator)]
        partner = dict(zip(index.tolist(), others.tolist(), strict=True))

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = training.label_smoothing
        return F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing, reduction="none")

    def losses(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
        inputs = augment(films, part, training.augmentation, generator, all_views=False)[:, 0]
        if not mixed:
            return loss_of(model(inputs), films.labels[part])
        other = torch.tensor([partner[i] for i in part.tolist()])
        partners = augment(films, other, training.augmentation, generator, all_views=False)[:, 0]
        logits = model(share * inputs + (1 - share) * partners)
        both = [loss_of(logits, films.labels[i]) for i in (part, other)]
        return share * both[0] + (1 - share) * both[1]

    return losses


def augment(films, index: torch.Tensor, augmentation: tuple[str, ...], generator: torch.Generator, *, all_views: bool):
    """Inputs [B, V, ...] of some films: all their cached views, or one of them at random; pixels are changed anew."""
    if all_views:
        inputs = torch.index_select(films.inputs, 0, index)  # faster than films.inputs[index]
    else:
        view = torch.randint(films.inputs.shape[1], (len(index),), generator=generator)
        inputs = films.inputs[index, view][:, None]
    if inputs.dim() == 5 and len(index):
        pixels = inputs[:, 0]
        for name in ("flip", "shift", "stretch"):
            if name in augmentation:
                pixels = getattr(aug, name)(pixels, generator)
        if "jitter" in augmentation:
            pixels = films.normalise(aug.jitter(films.denormalise(pixels), generator))
        inputs = pixels[:, None]
    return inputs


@torch.no_grad()
def predict(model: nn.Module, films: Films, batch_size: int = 256) -> np.ndarray:
    """Class probabilities of films, float64 [N, K]: the softmax of the mean of the logits of each film's views."""
    model.eval()
    probabilities = []
    for batch in films.inputs.split(batch_size):
        logits = model(batch.flatten(0, 1)).double().view(*batch.shape[:2], -1)
        probabilities.append(logits.mean(1).softmax(1))
    return torch.cat(probabilities).numpy()
