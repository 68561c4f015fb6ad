"""``primia-lite audit``: claimed and audited ε side by side, and the privacy card of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

import mistune

from primia_lite.attacks.auditing import Finding, audit
from primia_lite.config import UserError
from primia_lite.federation import checkpoints
from primia_lite.federation.study import privacy_from, training_from
from primia_lite.models import spec
from primia_lite.privacy import Ledger, Privacy
from primia_lite.runtime import write_atomic
from primia_lite.training import Training

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Privacy card</title><style>body{{max-width:52em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}th,td{{border:1px solid #bbb;padding:.3em .6em;
text-align:left}}@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}}}</style>{}</html>
"""


def command(args: argparse.Namespace) -> int:
    """Print what was found; 1 where a claim is refuted."""
    if args.card and not args.folder:
        raise UserError("a privacy card is of a run: name its folder")
    about = checkpoints.about(Path(args.folder)) if args.folder else None
    if about:
        training, privacy = training_from(about["training"]), privacy_from(about["privacy"])
    else:
        training = Training(sample_rate=args.sample_rate, label_smoothing=0.1)
        privacy = Privacy.for_budget(
            args.epsilon, sample_rate=args.sample_rate, steps=args.steps, max_grad_norm=0.25
        )  # fmt: skip
    if privacy is None and not args.card:
        raise UserError(f"the run in {args.folder} had no DP: nothing was claimed that could be audited")
    auditable = privacy and not privacy.shared and spec(training.model).extract
    found = audit(training, privacy, how=args.how, n=args.n) if auditable or not args.card else []
    print(table(found))
    if args.card:
        text = card(Path(args.folder), about, training, privacy, found)
        folder = Path(args.folder)
        write_atomic(folder / "privacy_card.md", text.encode())
        html = PAGE.format(mistune.create_markdown(plugins=["table"])(text))
        print(f"written: {write_atomic(folder / 'privacy_card.html', html.encode())}, privacy_card.md")
    return int(any(f.refuted for f in found))


def table(found: list[Finding]) -> str:
    """Claimed and audited ε, as a Markdown table."""
    rows = ["| how | n | claimed ε | audited, at least | if DP-SGD | CPU s | |", "|---|---|---|---|---|---|---|"]
    rows += [
        f"| {f.how} | {f.n:,} | {f.claimed:.2f} | {f.epsilon:.2f} | {f.mechanism_epsilon:.2f} | {f.seconds:.1f} | "
        f"{'**refuted**' if f.refuted else 'nothing contradicts it'} |"
        for f in found
    ]
    if found:
        rows += ["", f"Each bound is wrong with probability {found[0].alpha:g} at most, at δ = {found[0].delta:g}. A "
                     "bound below the claim is no proof: another attack may find more."]  # fmt: skip
    return "\n".join(rows)


def card(folder: Path, about: dict, training: Training, privacy: Privacy | None, found: list[Finding]) -> str:
    """The privacy card of a run, Markdown: all that it says is read from the run's folder and from the audit."""
    lines = [f"# Privacy card: {training.model}", ""]
    seeded = about["noise_seed"] is not None
    if privacy is None:
        lines += ["**This model was trained without differential privacy.** It may have learnt any film by heart."]
    else:
        unit = {"patient": "a patient with all their films at one hospital", "film": "a single film"}[privacy.unit]
        lines += [
            f"**Promised** to {unit}: whether their films were there or empty changes the probability of anything that "
            "was released by a factor of e^ε at most, but for δ (zero-out adjacency). Each hospital keeps its ledger.",
            "",
            "| hospital | declared patients | declared films | ε spent | budget | δ | counted by |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, declared in about["declared"].items():
            path = folder / f"ledger-{name}.sqlite"
            spent = Ledger(path).spent() if path.exists() else None
            told = f"{spent['epsilon']:.3f} | {spent['budget']:g} | {spent['delta']:g}" if spent else "elsewhere | | "
            rule = {"plan": "PLD, by plan", "filter": "RDP filter"}[spent["rule"]] if spent else "a lasting ledger"
            lines += [f"| {name} | {declared['patients']} | {declared['films']} | {told} | {rule} |"]
        steps, rounds = training.steps_per_round, about["schedule"]["rounds"]
        clip, rate = privacy.max_grad_norm, training.sample_rate
        lines += ["", f"Noise multiplier {privacy.noise_multiplier:g}, clipping bound {clip:g}, sample rate {rate:g}, "
                      f"local steps a round {steps}, rounds {rounds}."]  # fmt: skip
        if seeded:
            lines += ["", "**Noise and sampling came from a fixed seed: nothing is private.**"]
    lines += [
        "",
        "**Outside ε**: choosing by validation films, declared numbers, and that a step is refused for a gradient "
        "which isn't finite. A child treated at two hospitals has spent the sum.",
        "",
        f"**Updates were summed** by: {about['aggregator']}."
        + (" Hospitals made their noise together." if privacy and privacy.shared else ""),
        "",
        "## What an audit found",
        "",
        table(found) if found else "No audit of this kind of training within a card.",
        "",
        "## Made with",
        "",
        f"Seed {about['seed']} of the initial weights; {about['time']}; {about['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + ".",
        "",
        "Not for clinical use.",
    ]
    return "\n".join(lines) + "\n"
