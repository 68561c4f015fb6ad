"""Audits: the product's own training path, attacked in the worst case that DP promises against.

A *canary* is a made-up patient whose gradient nobody else's hides. If guesses of which canaries took part are right
more often than the claimed ε allows, the claim is wrong. The bounds are in :mod:`primia_lite.attacks.bounds`.

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
from scipy.special import logsumexp, softmax
from scipy.stats import binom

from primia_lite import models
from primia_lite.attacks import bounds, canaries, low_bits
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.federation.hospital import State, Update, declare_size, local_update
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.dpsgd import Privacy
from primia_lite.privacy.rng import SecureGenerator
from primia_lite.training import Training

LEARNING_RATE = 1e-3
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
        found = f"claimed {self.claimed:.2f}, at least {self.epsilon:.2f} ({self.mechanism_epsilon:.2f} if DP-SGD)"
        return f"{self.how}, n = {self.n:,}: {found}: {'REFUTED' if self.refuted else 'nothing contradicts it'}"


def audit(
    training: Training,
    privacy: Privacy,
    films: Films | None = None,
    *,
    how: str | None = None,
    n: int | None = None,
    alpha: float = 0.05,
    compute_update: ComputeUpdate = local_update,
    seed: int | None = None,
) -> list[Finding]:
    """Put lower bounds on ε beside the claim, by attacks on the training itself.

    Parameters
    ----------
    films : other patients of the hospital, prepared for the model; left out: some made-up ones, for a linear head
    how : ``one run`` (many canaries), ``many runs`` (one canary, there or not), or ``low bits`` (one step, whose last
        digits may tell what noise was added to); the first and the last for linear heads on frozen features only. Left
        out: many runs for full batches and for networks that are trained whole, else one run
    n : canaries (5,000 if left out), or runs with and runs without the canary (1,000; of one step 200)
    alpha : probability with which a bound may be wrong
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
    if how not in AUDITS:
        raise UserError(f"an audit is by one of {', '.join(AUDITS)}, not by {how!r}")
    if whole and (how != "many runs" or films is None):
        raise UserError(f"{training.model} is trained whole: audit it by many runs, with films prepared for it")
    if not privacy.planned:
        raise UserError("an audit needs the number of steps: make privacy by Privacy.for_budget, or give it planned=")
    rounds = max(1, privacy.planned[1] // training.steps_per_round)
    setting = _Setting(training.changed(learning_rate=LEARNING_RATE), privacy, rounds, alpha, compute_update, seed)
    return list(AUDITS[how](setting, films, n))


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
    others = films or canaries.made_up(training, draw)
    both = canaries.with_canaries(others, np.flatnonzero(inside), label, m, privacy.unit)
    width = others.inputs.shape[2]
    declared = declare_size(len(others.units(privacy.unit)) + m // 2)
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
        clipped = np.minimum(1, length / privacy.max_grad_norm)
        ratio += log_likelihood_ratio(noisy, clipped, setting.release, setting.rounds)
        seen.append(noisy)
    final = (before["weight"] + update["weight"])[:, width:].double().numpy().T
    logit = final[np.arange(m), label]
    attacks = {
        "one run, every update": ratio,
        "one run, changes between updates": np.std(seen, 0),
        "one run, one round in so many": _kept_batches(seen, clipped, setting),
        "one run, released model": logit - (final.sum(1) - logit) / (training.n_classes - 1),
    }
    if setting.rounds == 1:
        del attacks["one run, changes between updates"]
    if not 1 < round(1 / training.sample_rate) <= setting.rounds // 2:
        del attacks["one run, one round in so many"]
    guesses = guess_counts(setting.release, m, privacy.target_delta, setting.alpha)
    for how, scores in attacks.items():
        yield _guessed(setting, how, began, scores, inside, guesses)
        began = time.process_time()


def _guessed(setting: _Setting, how: str, began: float, scores, inside, guesses: tuple[int, int]) -> Finding:
    m, delta, alpha = len(scores), setting.privacy.target_delta, setting.alpha
    if not np.isfinite(scores).all():
        raise UserError("scores aren't all finite: lower the learning rate of the audit")
    # Ties are broken at random, not by the canaries' order.
    order = np.lexsort((np.random.default_rng(setting.seed).random(m), -scores))
    any_mechanism, own = ((int(inside[order[:k]].sum()), k, m) for k in guesses)
    least = bounds.one_run_epsilon(*any_mechanism, delta, alpha)
    excess = partial(_excess, own, alpha)
    own_least = bounds.mechanism_epsilon(excess, setting.release, delta)
    return setting.finding(how, m, began, least, own_least, (scores[inside], scores[~inside]))


def _excess(counts: tuple[int, int, int], alpha: float, trade_off: bounds.TradeOff) -> float:
    return bounds.one_run_excess(*counts, trade_off, alpha)


def log_likelihood_ratio(noisy: np.ndarray, length: np.ndarray, release: Release, rounds: int) -> np.ndarray:
    """Of a canary that takes part in each step with the sample rate, against one that isn't there, from the sum of a
    round's clipped gradients along its own, in units of the bound. ``length`` of its clipped gradient."""
    steps, q = release.steps // rounds, release.sample_rate
    variance = steps * release.noise_multiplier**2
    times = np.arange(steps + 1)[:, None] if q < 1 else np.array([[steps]])
    chance = binom.logpmf(times, steps, q)
    moved = times * length
    return logsumexp(chance + (noisy * moved - moved**2 / 2) / variance, axis=0)


def _kept_batches(noisy: list[np.ndarray], length: np.ndarray, setting: _Setting) -> np.ndarray:
    """The likelihood ratio of a canary that takes part in each n-th round for certain, n one over the sample rate."""
    period, certain = round(1 / setting.release.sample_rate), replace(setting.release, sample_rate=1.0)
    each = np.array([log_likelihood_ratio(row, length, certain, setting.rounds) for row in noisy])
    return logsumexp([each[first::period].sum(0) for first in range(period)], axis=0)


@lru_cache(maxsize=32)
def guess_counts(release: Release, canaries: int, delta: float, alpha: float) -> tuple[int, int]:
    """How many canaries to name, at this δ and at δ = 0: what gave most in simulated audits of the claimed mechanism,
    before any scores are seen."""
    rng = np.random.default_rng(0)
    tried = np.unique(np.geomspace(10, canaries / 2, 12).astype(int))
    right = []
    for _ in range(TRIALS):
        inside = rng.random(canaries) < 0.5
        scores = np.zeros(canaries)
        for _ in range(release.steps):
            noisy = rng.normal(0, release.noise_multiplier, canaries)
            noisy += inside * (rng.random(canaries) < release.sample_rate)
            scores += log_likelihood_ratio(noisy, np.ones(canaries), replace(release, steps=1), 1)
        right.append(inside[np.argsort(-scores)].cumsum()[tried - 1])

    def best(slack: float) -> int:
        found = [
            sum(bounds.one_run_epsilon(int(r[i]), int(k), canaries, slack, alpha) for r in right)
            for i, k in enumerate(tried)
        ]
        return int(tried[np.argmax(found)])

    return best(delta), best(0.0)


# --- many runs, one canary --------------------------------------------------------------------------------------------


def _many_runs(setting: _Setting, films: Films | None, n: int | None) -> Iterator[Finding]:
    """The same training again and again, with and without the canary."""
    began, runs = time.process_time(), 1000 if n is None else n
    if runs < 16:
        raise UserError(f"there are {runs} runs: a bound needs at least 16 with and 16 without the canary")
    training, privacy = setting.training, setting.privacy
    worlds, canary, state = canaries.worlds(training, privacy.unit, films, setting.seed)
    declared = declare_size(len(worlds[1].units(privacy.unit)))
    direction = canaries.gradient(state, canary, training)
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


def _low_bits(setting: _Setting, films: Films | None, n: int | None) -> Iterator[Finding]:
    """One step on a full batch, whose sum the attacker knows but for the canary."""
    began, plays = time.process_time(), 200 if n is None else n
    training, privacy = setting.training, setting.privacy
    everybody = films or canaries.made_up(training, np.random.default_rng(setting.seed))
    worlds = everybody.subset(everybody.patient_id != everybody.patient_id[0]), everybody
    state = {"weight": torch.zeros(training.n_classes, everybody.inputs.shape[2])}
    # A learning rate and a denominator that are powers of two: the weights give the step exactly.
    exact = training.changed(learning_rate=1.0, sample_rate=1.0, local_steps=1, local_epochs=None, weight_decay=0.0)
    setting = replace(setting, training=exact, rounds=1, privacy=replace(privacy, planned=(1.0, 1)))
    sums = [low_bits.clipped_sum(seen, exact, privacy) for seen in worlds]
    scores = np.zeros((2, plays))
    for world, seen in enumerate(worlds):
        for play in range(plays):
            ((_, update),) = setting.run(state, seen, low_bits.DENOMINATOR, 2 * play + world)
            released = -low_bits.DENOMINATOR * update["weight"].numpy()
            absent, present = (low_bits.share_consistent(released, s, privacy) for s in sums)
            scores[world, play] = present - absent
    found = bounds.two_sample_bounds(scores[1], scores[0], privacy.target_delta, setting.alpha)
    yield setting.finding("low bits of one step", plays, began, found.epsilon, found.epsilon, (scores[1], scores[0]))


AUDITS = {"one run": _one_run, "many runs": _many_runs, "low bits": _low_bits}
