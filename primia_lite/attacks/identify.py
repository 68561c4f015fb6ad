"""The identification game: which of N candidate films made a noisy update?

An inversion that fails may only have stopped too early. Here the attacker holds all N films, and has to name the one
that took part. Against the Gaussian mechanism the best attacker is known: it names the likeliest candidate. How often
it is right is what the noise buys, free of an optimiser's luck; the bound of reconstruction robustness
(:func:`rero_bound`; Balle, Cherubin, Hayes 2022; Hayes, Mahloujifar, Balle 2023) lies above.

All other films, and which steps they take part in, are known to the attacker, so they cancel. Gradients are in units of
the clipping bound C (norm at most 1), and so is the noise: ``sigma`` is the noise multiplier. Of an update u only
<g_j, u> matters, whose noise is Gaussian with the Gram matrix for its covariance: it is drawn as such, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import log_ndtr, ndtr, ndtri, stdtrit
from scipy.stats import binomtest

from primia_lite import models
from primia_lite.attacks.simulate import clipping_alone
from primia_lite.attacks.view import State
from primia_lite.config import UserError
from primia_lite.data.films import Films
from primia_lite.privacy.accounting import Release
from primia_lite.privacy.accounting.guarantees import tpr_upper_bound
from primia_lite.privacy.clipping import clipped_sum
from primia_lite.privacy.dpsgd import PoissonBatch
from primia_lite.runtime import in_notebook, torch_threads
from primia_lite.training import Training, check_options, private_rows

# Squared distance, over the largest squared norm, at which two candidates are one: float32 rounds by 1e-7.
_TWIN = 1e-10
# What an attacker takes the noise for where there is none.
_SMALL = 1e-6
_PART_COLUMNS, _PART_TRIALS = 1 << 15, 256


@dataclass(frozen=True)
class Rate:
    """A share of n trials that succeeded, and its 95 % interval."""

    rate: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: int, n: int, method: str = "exact") -> Rate:
        """By Clopper and Pearson (1934), or another of scipy's intervals of a proportion."""
        interval = binomtest(hits, n).proportion_ci(0.95, method)
        return cls(hits / n, float(interval.low), float(interval.high), n)

    def __str__(self) -> str:
        return f"{self.rate:.1%} ({self.low:.1%} to {self.high:.1%}, n = {self.n})"


def clipped_gradients(state: State, films: Films, training: Training, max_grad_norm: float) -> torch.Tensor:
    """Each film's own clipped gradient over C = ``max_grad_norm``, float32 [N, P]: what a step of it alone sums up.

    By the product's own rows and clipping; a test holds it equal to ``local_update`` on each film.
    """
    from tqdm.auto import tqdm

    if training.sample_rate != 1 or training.steps_per_round != 1:
        raise UserError("a film's own gradient is that of one full-batch step: set sample_rate=1.0, local_steps=1")
    if films.inputs.dim() == 5 and training.augmentation:
        raise UserError("augmentation changes pixels at random, so a film has no one gradient: leave it out")

    privacy = clipping_alone(max_grad_norm)
    check_options(training, privacy)
    model = models.build(training.model, training.n_classes, films.inputs.shape[2:], **training.model_options)
    model.load_state_dict(state)
    model.train()
    weight = None if training.class_weights is None else torch.tensor(training.class_weights, dtype=torch.float32)
    batch = PoissonBatch(torch.tensor([0]), 1.0)
    out = torch.empty(len(films), sum(p.numel() for p in model.parameters() if p.requires_grad))
    with torch_threads(1):
        for i in tqdm(range(len(films)), desc="gradients", unit="film", leave=False, disable=not in_notebook()):
            (rows,) = private_rows(films.subset([i]), batch, training, "film", weight, torch.Generator())
            own, norms, _ = clipped_sum(model, rows.losses, rows.owner, 1, max_grad_norm)
            if not torch.isfinite(norms).all():
                raise UserError(f"the gradient of film {i} isn't finite: leave it out, or check the weights")
            out[i] = torch.cat([value.flatten() for value in own.values()]) / max_grad_norm
    return out


def gram(gradients) -> torch.Tensor:
    """Inner products of gradients [N, P]: float64 [N, N]."""
    gradients = torch.as_tensor(gradients)
    if gradients.dim() != 2 or not len(gradients):
        raise UserError(f"gradients of shape {tuple(gradients.shape)}: give one row for each film")
    out = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(_PART_COLUMNS, 1):
        out.addmm_(part.double(), part.double().T)
    return out


def _checked(matrix) -> torch.Tensor:
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    if matrix.shape != (len(matrix), len(matrix)) or not torch.isfinite(matrix).all():
        raise UserError(f"a Gram matrix is square and finite, this one is {tuple(matrix.shape)}: make it by gram()")
    return matrix


def _check(sigma: float, steps: int = 1, sample_rate: float = 1.0, *, counts: tuple[int, ...] = ()) -> None:
    if not 0 <= sigma < math.inf or (sigma == 0 and sample_rate < 1):
        raise UserError(f"sigma is {sigma}: it must be finite and above 0 (or 0, clipping alone, at sample_rate 1)")
    if not 0 < sample_rate <= 1:
        raise UserError(f"sample_rate is {sample_rate}: it must be in (0, 1]")
    if min(steps, *counts, 1) < 1:
        raise UserError("steps, trials and numbers of candidates or classes must be at least 1")


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    """L with L Lᵀ the matrix, which may be singular."""
    value, vector = torch.linalg.eigh(matrix)
    return vector * value.clamp(min=0).sqrt()


def top1_rate(gram, sigma: float, *, steps: int = 1, sample_rate: float = 1.0, trials: int = 1000, seed=0) -> Rate:
    """How often the best attacker names the film, each of N being as likely, by playing.

    At each step it sees u = b g_i + σ n, with b = 1 at probability q. It sums log(1 - q + q exp((<g_j, u> - ‖g_j‖² / 2)
    / σ²)), the log likelihood ratio of j taking part to nobody, and names the j of the largest sum. Of m candidates
    with one gradient (twins) it names any at random: a tie counts 1 / m on average, and trials stay yes or no.

    ``gram`` is float [N, N], see :func:`gram`; the gradients are the same at each step.
    """
    _check(sigma, steps, sample_rate, counts=(trials,))
    matrix = _checked(gram)
    squares = matrix.diag()
    near = squares[:, None] + squares - 2 * matrix <= _TWIN * squares.max()
    group = near.int().argmax(1)  # the first of its twins
    twins = torch.bincount(group)[group]
    generator = torch.Generator().manual_seed(seed)
    if sample_rate == 1:
        sigma, steps = sigma / math.sqrt(steps), 1  # the sum over steps says it all
    # With sampling there are many draws: in float32, whose rounding is far below the noise.
    kind = torch.float64 if sample_rate == 1 else torch.float32
    factor, signal, half = _factor(matrix).to(kind), matrix.to(kind), (squares / 2).to(kind)[:, None]
    hits = 0
    for start in range(0, trials, _PART_TRIALS):
        n = min(_PART_TRIALS, trials - start)
        truth = torch.randint(len(matrix), (n,), generator=generator)
        score, own = torch.zeros(len(matrix), n, dtype=kind), signal[:, truth]
        for _ in range(steps):
            takes_part = torch.rand(n, generator=generator) < sample_rate
            noise = sigma * (factor @ torch.randn(len(matrix), n, generator=generator, dtype=kind))
            ratio = (own * takes_part + noise - half) / max(sigma, _SMALL) ** 2
            if sample_rate < 1:  # beyond 60, where its exponential may overflow, the sum grows as the ratio does
                ratio = (sample_rate * ratio.clamp(max=60).expm1()).log1p() + (ratio - 60).clamp(min=0)
            score += ratio
        right = group[score.argmax(0)] == group[truth]
        hits += int((right & (torch.rand(n, generator=generator) * twins[truth] < 1)).sum())
    return Rate.of(hits, trials)


def rero_bound(sigma: float, n_candidates: int, *, steps: int = 1, sample_rate: float = 1.0) -> float:
    """No attacker names the right one of N equally likely films more often, whatever the gradients.

    The largest true positive rate of a test for the film's presence at a false positive rate of 1/N: at q = 1
    Φ(Φ⁻¹(1/N) + sqrt(steps) / σ), else an upper bound of it,
    :func:`~primia_lite.privacy.accounting.guarantees.tpr_upper_bound`, which takes the worse of adding and removing.
    """
    _check(sigma, steps, sample_rate, counts=(n_candidates,))
    if sample_rate == 1:
        return float(ndtr(ndtri(1 / n_candidates) + math.sqrt(steps) / sigma)) if sigma else 1.0
    return float(tpr_upper_bound(Release(sigma, sample_rate, steps), [1 / n_candidates])[0])


def orthogonal_rate(sigma: float, n_candidates: int, steps: int = 1) -> float:
    """:func:`top1_rate` of N orthogonal gradients of norm 1: E[Φ(z + sqrt(steps) / σ)^(N - 1)], by quadrature.

    Near the worst that clipping leaves: a regular simplex lies wider by sqrt(N / (N - 1)) only.
    """
    _check(sigma, steps, counts=(n_candidates,))
    if sigma == 0:
        return 1.0
    z = torch.linspace(-12, 12, 9601, dtype=torch.float64)  # the trapezium rule is exact to rounding here
    others = (n_candidates - 1) * torch.from_numpy(log_ndtr((z + math.sqrt(steps) / sigma).numpy()))
    return float((others - z**2 / 2).exp().sum() * (z[1] - z[0]) / math.sqrt(2 * math.pi))


def diagnosis_rate(gradients, labels, known_gradients, known_labels, sigma: float, seed=0, *, steps: int = 1) -> Rate:
    """Balanced accuracy of a film's diagnosis read off its noisy gradient, by a gallery of other films.

    The attacker doesn't hold the film. It weighs each known film by its likelihood, and calls the class of the largest
    mean weight, since each class is as likely.

    Of ``gradients`` [N, P] with ``labels`` [N] each is attacked once; the gallery has M. The rate is the mean over K
    classes of the share called right, at most :func:`rero_bound` with N = K; its interval is put together from Wilson's
    (1927) of the classes, as by Zou and Donner (2008); n films.
    """
    _check(sigma, steps)
    gradients, known = torch.as_tensor(gradients).double(), torch.as_tensor(known_gradients).double()
    labels, known_labels = torch.as_tensor(labels), torch.as_tensor(known_labels)
    if len(labels) != len(gradients) or len(known_labels) != len(known):
        raise UserError(f"{len(gradients)} and {len(known)} gradients, {len(labels)} and {len(known_labels)} labels")
    classes = known_labels.unique()
    if missing := set(labels.tolist()) - set(classes.tolist()):
        raise UserError(f"the gallery has no film of class {min(missing)}: add some, or leave that class out")
    sigma, matrix, generator = sigma / math.sqrt(steps), gram(known), torch.Generator().manual_seed(seed)
    noise = torch.randn(len(known), len(labels), generator=generator, dtype=torch.float64)
    score = known @ gradients.T + sigma * (_factor(matrix) @ noise) - matrix.diag()[:, None] / 2
    score /= max(sigma, _SMALL) ** 2
    weight = torch.stack([score[known_labels == c].logsumexp(0) - (known_labels == c).sum().log() for c in classes])
    right = classes[weight.argmax(0)] == labels
    each = [Rate.of(int(right[labels == c].sum()), int((labels == c).sum()), "wilson") for c in labels.unique()]
    mean = math.fsum(r.rate for r in each) / len(each)
    below = math.hypot(*(r.rate - r.low for r in each)) / len(each)
    above = math.hypot(*(r.high - r.rate for r in each)) / len(each)
    return Rate(mean, max(0.0, mean - below), min(1.0, mean + above), len(labels))


def membership_recall(gram, sigma: float, batch_size: int, trials: int = 20, seed: int = 0) -> Rate:
    """Share of a batch of B that is found among N candidates, from the noisy sum of their clipped gradients.

    B of N take part, each set as likely, and only their sum is seen, as under secure aggregation. The attacker makes
    the best linear estimate of who did (ridge regression on centred gradients, as B is known) and names the B largest.
    Guessing finds B / N. Not a bound: an attack that isn't linear may find more. The rate is the mean recall of n
    trials; its interval the wider of Student's over trials and that of all B x trials calls as independent.
    """
    _check(sigma, counts=(trials,))
    matrix = _checked(gram)
    size, generator = len(matrix), torch.Generator().manual_seed(seed)
    if not 1 <= batch_size < size:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1, and below the {size} candidates")
    # With C = I - 11ᵀ/N, who takes part has covariance v C, and the estimate is (CKC + σ²/v)⁻¹ C G (sum - B mean).
    variance = batch_size * (size - batch_size) / (size * (size - 1))
    value, vector = torch.linalg.eigh(matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean())
    value = value.clamp(min=0)[:, None]
    ridge = max(sigma**2 / variance, _SMALL**2 * float(value.mean()), 1e-30)
    chosen = torch.rand(size, trials, generator=generator).topk(batch_size, 0).indices
    member = torch.zeros(size, trials, dtype=torch.float64).scatter_(0, chosen, 1.0)
    noise = torch.randn(size, trials, generator=generator, dtype=torch.float64)
    estimate = vector @ ((value * (vector.T @ member) + sigma * value.sqrt() * noise) / (value + ridge))
    recall = member.gather(0, estimate.topk(batch_size, 0).indices).mean(0)
    calls = Rate.of(round(float(recall.sum()) * batch_size), trials * batch_size)
    mean, spread = float(recall.mean()), 0.0
    if trials > 1:
        spread = float(recall.std()) * float(stdtrit(trials - 1, 0.975)) / math.sqrt(trials)
    return Rate(mean, max(0.0, min(calls.low, mean - spread)), min(1.0, max(calls.high, mean + spread)), trials)
