"""Audits: the product's own training path, attacked in the worst case that DP promises against.

A *canary* is a made-up patient whose gradient nobody else's hides. If guesses of which canaries took part are right more
often than the claimed ε allows, the claim is wrong. The bounds are in :mod:`primia_lite.attacks.bounds`.

What varies is that canary patients are there or not, while the declared number stays (zero-out adjacency). The learning
rate is lowered so that the model stays where canaries' gradients are large: ε doesn't depend on it. A model that was
trained with canaries is for the audit alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from scipy.special import gammaln, logsumexp, softmax
from torch.nn import functional as F

from primia_lite import models
from primia_lite.attacks import bounds
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import State, Update, declare_size, local_update, network
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training

LEARNING_RATE = 1e-3
OTHERS, FEATURES = 40, 64  # patients beside the canaries where no films are given, and their features
TRIALS = 3  # simulated audits that choose the number of guesses


class ComputeUpdate(Protocol):
    """The step under audit: :func:`~primia_lite.federation.hospital.local_update`, or one with a bug in it."""

    def __call__(
        self, global_state: State, films: Films, training: Training, privacy: Privacy, rng: SecureGenerator, *,
        declared_size: int,
    ) -> Update: ...  # fmt: skip


@dataclass(frozen=True, eq=False)
class Finding:
    """What an audit found.

    Attributes
    ----------
    how : which audit
    claimed : ε of the steps that were audited, by the accountant, at ``delta``
    epsilon : ε is at least this, whatever the mechanism, but with probability ``alpha``
    mechanism_epsilon : ε is at least this if the mechanism is DP-SGD with some noise, Gaussian and Poisson-sampled
    n : canaries of one run, or runs
    seconds : of CPU
    present, absent : scores of canaries that took part and that didn't, float64
    """

    how: str
    claimed: float
    epsilon: float
    mechanism_epsilon: float
    n: int
    seconds: float
    delta: float
    alpha: float
    present: np.ndarray = field(repr=False)
    absent: np.ndarray = field(repr=False)

    @property
    def refuted(self) -> bool:
        """Whether the claim is wrong: no DP-SGD with the claimed noise, sample rate and steps gives such scores."""
        return max(self.epsilon, self.mechanism_epsilon) > self.claimed

    def __str__(self) -> str:
        found = (
            f"claimed {self.claimed:.2f}, audited at least {self.epsilon:.2f} ({self.mechanism_epsilon:.2f} if DP-SGD)"
        )
        verdict = (
            "the claim is refuted: this training isn't what its ε was counted for"
            if self.refuted
            else "nothing contradicts the claim, which proves nothing: another attack may find more"
        )
        return f"{self.how}, {self.n:,}: {found}; {verdict}"


def audit(
    training: Training,
    privacy: Privacy,
    films: Films | None = None,
    *,
    how: str | None = None,
    n: int | None = None,
    rounds: int | None = None,
    alpha: float = 0.05,
    learning_rate: float | None = LEARNING_RATE,
    compute_update: ComputeUpdate = local_update,
    seed: int | None = None,
) -> list[Finding]:
    """Put lower bounds on ε beside the claim, by attacks on the training itself.

    Parameters
    ----------
    films : other patients of the hospital, prepared for the model; left out: some made-up ones, for a linear head
    how : ``one run`` (many canaries, linear heads on frozen features only) or ``many runs`` (one canary, there or not);
        left out: many runs for full batches and for networks that are trained whole, else one run
    n : canaries (5,000 if left out), or runs with and runs without the canary (1,000)
    rounds : of the audited training; left out: as many as ``privacy`` planned
    alpha : probability with which a bound may be wrong
    learning_rate : of the audited steps; None takes the training's own
    compute_update : the step under audit
    seed : fixes canaries, sampling and noise, for tests

    Raises
    ------
    UserError
        An audit that this training doesn't allow, or too few canaries or runs for a bound.
    """
    if privacy.shared:
        raise UserError("hospitals that make their noise together are audited by the same noise alone: shared=None")
    whole = models.spec(training.model).extract is None
    how = how or ("many runs" if whole or training.sample_rate == 1 else "one run")
    if how not in ("one run", "many runs"):
        raise UserError(f"an audit is by 'one run' or 'many runs', not by {how!r}")
    if whole and (how == "one run" or films is None):
        raise UserError(f"{training.model} is trained whole: audit it by many runs, with films prepared for it")
    if rounds is None:
        if not privacy.planned:
            raise UserError("privacy has no plan: say how many rounds to audit")
        rounds = max(1, privacy.planned[1] // training.steps_per_round)
    if learning_rate:
        training = training.changed(learning_rate=learning_rate)
    setting = _Setting(training, privacy, rounds, alpha, compute_update, seed)
    return list((_one_run if how == "one run" else _many_runs)(setting, films, n))


@dataclass(frozen=True)
class _Setting:
    training: Training
    privacy: Privacy
    rounds: int
    alpha: float
    compute_update: ComputeUpdate
    seed: int | None

    @property
    def release(self) -> Release:
        return self.privacy.release(self.training.sample_rate, self.rounds * self.training.steps_per_round)

    def run(self, state: State, films: Films, declared: int, run: int = 0) -> Iterator[tuple[State, State]]:
        """Global weights before each round, and the update."""
        for number in range(self.rounds):
            rng = SecureGenerator() if self.seed is None else SecureGenerator.from_seed(self.seed).child(run, number)
            update = self.compute_update(state, films, self.training, self.privacy, rng, declared_size=declared).delta
            yield state, update
            state = {name: value + update[name] if name in update else value for name, value in state.items()}

    def finding(self, how, n, began, epsilon, mechanism_epsilon, scores) -> Finding:
        claimed = self.privacy.epsilon(self.training.sample_rate, self.release.steps)
        seconds = time.process_time() - began
        delta = self.privacy.target_delta
        return Finding(how, claimed, epsilon, mechanism_epsilon, n, seconds, delta, self.alpha, *scores)


# --- one run, many canaries -------------------------------------------------------------------------------------------


def _one_run(setting: _Setting, films: Films | None, n: int | None) -> Iterator[Finding]:
    """Canaries are one-hot in features of their own, each there with probability 1/2."""
    began, m = time.process_time(), 5000 if n is None else n
    if m < 20:
        raise UserError(f"there are {m} canaries: a bound needs at least 20, and a thousand to say much")
    training, privacy = setting.training, setting.privacy
    draw = np.random.default_rng(setting.seed)
    inside, label = draw.random(m) < 0.5, draw.integers(training.n_classes, size=m)
    if inside.all() or not inside.any():
        raise UserError("all canaries took part, or none did: there is nothing to guess; take more of them")
    others = films or _made_up(training, draw)
    both = _with_canaries(others, np.flatnonzero(inside), label, m, privacy.unit)
    width = others.inputs.shape[2]
    declared = declare_size(len(others.units(privacy.unit)) + (m // 2) * _films_each(privacy.unit))
    state = {"weight": torch.zeros(training.n_classes, width + m)}
    target = np.full((m, training.n_classes), training.label_smoothing / training.n_classes)
    target[np.arange(m), label] += 1 - training.label_smoothing
    ratio, seen = np.zeros(m), []
    for before, update in setting.run(state, both, declared):
        weights, change = (x["weight"][:, width:].double().numpy().T for x in (before, update))
        error = softmax(weights, 1) - target  # of a canary's logits; its gradient is this in its own feature
        length = np.linalg.norm(error, axis=1)
        step = change / training.learning_rate + training.steps_per_round * training.weight_decay * weights
        noisy = -(step * error).sum(1) / length * declared * training.sample_rate / privacy.max_grad_norm
        ratio += log_likelihood_ratio(
            noisy, np.minimum(1, length / privacy.max_grad_norm), setting.release, setting.rounds
        )
        seen.append(noisy)
    final = (before["weight"] + update["weight"])[:, width:].double().numpy().T
    logit = final[np.arange(m), label]
    attacks = {
        "one run, every update": ratio,
        "one run, changes between updates": np.std(seen, 0),
        "one run, one round in so many": _kept_batches(
            np.array(seen), np.minimum(1, length / privacy.max_grad_norm), setting
        ),
        "one run, released model": logit - (final.sum(1) - logit) / (training.n_classes - 1),
    }
    if setting.rounds == 1:
        del attacks["one run, changes between updates"]
    if round(1 / training.sample_rate) in (1, *range(setting.rounds // 2 + 1, 10**6)):
        del attacks["one run, one round in so many"]
    guesses = guess_counts(setting.release, m, setting.alpha)
    for how, scores in attacks.items():
        yield _guessed(setting, how, began, scores, inside, guesses)
        began = time.process_time()


def _guessed(setting: _Setting, how: str, began: float, scores, inside, guesses: tuple[int, ...]) -> Finding:
    """The best bound over so many guesses, each allowed its part of alpha."""
    m, delta, alpha = len(scores), setting.privacy.target_delta, setting.alpha / len(guesses)
    if not np.isfinite(scores).all():
        raise UserError("scores aren't all finite: lower the learning rate of the audit")
    # Ties are broken at random, not by the canaries' order.
    order = np.lexsort((np.random.default_rng(setting.seed).random(m), -scores))
    counts = [(int(inside[order[:k]].sum()), k, m) for k in guesses]
    least = max(bounds.one_run_epsilon(*count, delta, alpha) for count in counts)
    own = bounds.mechanism_epsilon(partial(_excess, counts, alpha), setting.release, delta)
    return setting.finding(how, m, began, least, own, (scores[inside], scores[~inside]))


def _excess(counts: list[tuple[int, int, int]], alpha: float, trade_off: bounds.TradeOff) -> float:
    return max(bounds.one_run_excess(*count, trade_off, alpha) for count in counts)


def log_likelihood_ratio(noisy: np.ndarray, length: np.ndarray, release: Release, rounds: int) -> np.ndarray:
    """Of a canary that takes part in each step with the sample rate, against one that isn't there, from the sum of a
    round's clipped gradients along its own, in units of the bound. ``length`` of its clipped gradient."""
    steps, q = release.steps // rounds, release.sample_rate
    variance = steps * release.noise_multiplier**2
    times = np.arange(steps + 1)[:, None] if q < 1 else np.array([[steps]])
    with np.errstate(divide="ignore"):
        chance = gammaln(steps + 1) - gammaln(times + 1) - gammaln(steps - times + 1)
        chance = chance + (times * np.log(q) + (steps - times) * np.log1p(-q) if q < 1 else 0.0)
    moved = times * length
    return logsumexp(chance + (noisy * moved - moved**2 / 2) / variance, axis=0)


def _kept_batches(noisy: np.ndarray, length: np.ndarray, setting: _Setting) -> np.ndarray:
    """The likelihood ratio of a canary that takes part in each n-th round for certain, n one over the sample rate."""
    period, certain = round(1 / setting.release.sample_rate), replace(setting.release, sample_rate=1.0)
    each = np.array([log_likelihood_ratio(row, length, certain, setting.rounds) for row in noisy])
    return logsumexp([each[first::period].sum(0) for first in range(period)], axis=0)


@lru_cache(maxsize=32)
def guess_counts(release: Release, canaries: int, alpha: float) -> tuple[int, ...]:
    """How many canaries to name: as many as gave most, at δ = 0, in simulated audits of the claimed mechanism, and a
    quarter of all, which shows a mechanism that leaks far more. Fixed before any scores are looked at."""
    rng = np.random.default_rng(0)
    tried = np.unique(np.geomspace(10, canaries / 2, 12).astype(int))
    found = np.zeros(len(tried))
    for _ in range(TRIALS):
        inside = rng.random(canaries) < 0.5
        scores = np.zeros(canaries)
        for _ in range(release.steps):
            noisy = rng.normal(0, release.noise_multiplier, canaries) + inside * (
                rng.random(canaries) < release.sample_rate
            )
            scores += log_likelihood_ratio(noisy, np.ones(canaries), replace(release, steps=1), 1)
        right = inside[np.argsort(-scores)].cumsum()
        found += [bounds.one_run_epsilon(int(right[k - 1]), int(k), canaries, 0.0, alpha) for k in tried]
    return tuple(sorted({int(tried[found.argmax()]), canaries // 4}))


def _films_each(unit: str) -> int:
    """Films of a canary: two where its unit is a patient, so that a step which counts films is found out."""
    return 2 if unit == "patient" else 1


def _made_up(training: Training, draw: np.random.Generator) -> Films:
    features = F.normalize(torch.from_numpy(draw.normal(size=(OTHERS, 1, FEATURES))).float(), dim=2)
    labels = torch.from_numpy(draw.integers(training.n_classes, size=OTHERS))
    return Films(features, labels, np.array([f"patient{i}" for i in range(OTHERS)]), model=training.model)


def _with_canaries(films: Films, inside: np.ndarray, label: np.ndarray, m: int, unit: str) -> Films:
    n, views, width = films.inputs.shape
    owner = inside.repeat(_films_each(unit))
    inputs = torch.zeros(n + len(owner), views, width + m)
    inputs[:n, :, :width] = films.inputs
    inputs[n + torch.arange(len(owner)), :, width + torch.from_numpy(owner)] = 1.0
    labels = torch.cat([films.labels, torch.from_numpy(label[owner])])
    names = np.concatenate([films.patient_id.astype(str), [f"canary {i}" for i in owner]])
    return replace(films, inputs=inputs, labels=labels, patient_id=names)


# --- many runs, one canary --------------------------------------------------------------------------------------------


def _many_runs(setting: _Setting, films: Films | None, n: int | None) -> Iterator[Finding]:
    """The same training again and again, with and without the canary."""
    began, runs = time.process_time(), 1000 if n is None else n
    if runs < 16:
        raise UserError(f"there are {runs} runs: a bound needs at least 16 with and 16 without the canary")
    training, privacy = setting.training, setting.privacy
    worlds, canary, state = _worlds(setting, films)
    declared = declare_size(len(worlds[1].units(privacy.unit)))
    direction = _gradient(state, canary, training)
    scores = []
    for world, seen in enumerate(worlds):
        along = np.zeros(runs)
        for run in range(runs):
            for _, update in setting.run(state, seen, declared, 2 * run + world):
                along[run] -= sum(float((update[name].double() * value).sum()) for name, value in direction.items())
        scores.append(along * declared * training.sample_rate / training.learning_rate / privacy.max_grad_norm)
    absent, present = scores
    found = bounds.two_sample_bounds(present, absent, privacy.target_delta, setting.alpha)
    excess = partial(bounds.two_sample_excess, found.gaussian_rates)
    own = (
        found.gaussian_epsilon  # exact for full batches
        if training.sample_rate == 1
        else bounds.mechanism_epsilon(excess, setting.release, privacy.target_delta)
    )
    yield setting.finding("many runs, every update", runs, began, found.epsilon, own, (present, absent))


def _worlds(setting: _Setting, films: Films | None) -> tuple[tuple[Films, Films], Films, State]:
    """Films without and with the canary, the canary's films, and the weights to start from.

    Made-up patients all pull against the canary in full batches, which shows whether its absence changes what the others
    weigh; where they are sampled, they pull elsewhere, as their number would hide it. Among real films the canary is the
    first patient, with wrong labels.
    """
    training, unit = setting.training, setting.privacy.unit
    if films is None:
        draw = np.random.default_rng(setting.seed)
        others = _made_up(training, draw)
        features = torch.zeros_like(others.inputs)
        features[:, :, 0 if training.sample_rate == 1 else 1] = 1.0
        others = replace(others, inputs=features, labels=torch.zeros_like(others.labels))
        shape = (_films_each(unit), *features.shape[1:])
        canary = torch.zeros(shape)
        canary[:, :, 0] = -1.0
        canary = Films(canary, torch.zeros(len(canary), dtype=torch.int64), np.array(["canary"] * len(canary)))
    else:
        first = films.patient_id == films.patient_id[0]
        canary, others = films.subset(first if unit == "patient" else [0]), films.subset(~first)
        canary = replace(canary, labels=(canary.labels + 1) % training.n_classes)
    both = replace(
        others,
        inputs=torch.cat([others.inputs, canary.inputs]),
        labels=torch.cat([others.labels, canary.labels]),
        patient_id=np.concatenate([others.patient_id.astype(str), canary.patient_id.astype(str)]),
    )
    model = network(training, both.inputs.shape[2:], setting.seed or 0)
    return (others, both), canary, {name: value.clone() for name, value in model.state_dict().items()}


def _gradient(state: State, canary: Films, training: Training) -> State:
    """Of the canary's mean loss, of length 1, by parameter."""
    model = network(training, canary.inputs.shape[2:])
    model.load_state_dict(state)
    model.eval()
    logits = model(canary.inputs.flatten(0, 1))
    labels = canary.labels.repeat_interleave(canary.inputs.shape[1])
    F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing).backward()
    gradient = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    length = sum(float((value**2).sum()) for value in gradient.values()) ** 0.5
    return {name: value / length for name, value in gradient.items()}
