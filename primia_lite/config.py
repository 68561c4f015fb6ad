"""Errors, folders and profiles. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

DATA_SOURCES = ("phantom", "kermany", "pneumoniamnist", "dicom")


class UserError(Exception):
    """A mistake that the user can mend. The message names the value and says what to do."""


class DataError(UserError):
    """A film, label, patient or folder that can't be used as it is."""


class BudgetError(UserError):
    """A release that would spend more privacy budget than a hospital allows."""


class TrainingError(UserError):
    """Training that can't go on, such as a loss that is no longer finite."""


def repo_root() -> Path:
    """The checkout that holds ``primia_lite/``, ``notebooks/`` and ``configs/``."""
    return Path(__file__).resolve().parent.parent


def _folder(variable: str, default: Path) -> Path:
    return Path(os.environ[variable]).expanduser().resolve() if os.environ.get(variable) else default


def data_root() -> Path:
    """Where films are looked for: ``PRIMIA_LITE_DATA``, or ``data/`` in the checkout."""
    return _folder("PRIMIA_LITE_DATA", repo_root() / "data")


def cache_dir() -> Path:
    """Resized films and frozen features, safe to delete: ``PRIMIA_LITE_CACHE``, or ``.cache/``."""
    return _folder("PRIMIA_LITE_CACHE", repo_root() / ".cache")


def runs_dir() -> Path:
    """Checkpoints, stored updates and ledgers of runs: ``PRIMIA_LITE_RUNS``, or ``runs/``."""
    return _folder("PRIMIA_LITE_RUNS", repo_root() / "runs")


def figures_dir() -> Path:
    """Where ``save_figure`` writes: ``PRIMIA_LITE_FIGURES``, or ``runs/figures/``.

    ``primia-lite run --profile paper`` points it at the committed ``figures/``; everything else leaves that folder
    alone.
    """
    return _folder("PRIMIA_LITE_FIGURES", repo_root() / "runs" / "figures")


def results_dir() -> Path:
    """Where ``write_results`` writes: ``PRIMIA_LITE_RESULTS``, or ``runs/results/`` (see :func:`figures_dir`)."""
    return _folder("PRIMIA_LITE_RESULTS", repo_root() / "runs" / "results")


def profile_names() -> list[str]:
    return sorted(p.stem for p in (repo_root() / "configs").glob("*.yaml"))


def load_profile(name: str) -> dict[str, dict]:
    """Read ``configs/<name>.yaml``: ``{notebook stem: {papermill parameter: value}}``.

    Raises
    ------
    UserError
        The profile is unknown, isn't a mapping, or names a notebook that doesn't exist.
    """
    import yaml

    path = repo_root() / "configs" / f"{name}.yaml"
    if name not in profile_names():
        raise UserError(f"unknown profile {name!r}: choose one of {', '.join(profile_names())} (configs/*.yaml)")
    try:
        profile = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"configs/{name}.yaml is not valid YAML: {error}") from error
    known = {p.stem for p in (repo_root() / "notebooks").glob("*.ipynb")}
    for notebook, parameters in profile.items():
        if notebook not in known:
            raise UserError(f"configs/{name}.yaml: no notebook {notebook!r}; there are {', '.join(sorted(known))}")
        if not isinstance(parameters or {}, dict):
            raise UserError(f"configs/{name}.yaml: {notebook} must map parameter names to values")
    return {notebook: parameters or {} for notebook, parameters in profile.items()}
