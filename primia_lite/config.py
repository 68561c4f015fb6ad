"""Errors, folders and profiles. Imports nothing heavy."""

from __future__ import annotations

import os
import tempfile
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


def printable(text: object, most: int | None = 2000) -> str:
    """A name, path or stranger's text for one line of a message, log or terminal.

    What isn't printable (controls, changes of direction, bytes of another encoding) is escaped, and what is then longer
    than ``most`` characters is cut (None: nothing is).
    """
    text = str(text) if most is None else str(text)[: most + 1]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if most is None or len(line) <= most else f"{line[: most - 3]}..."


def repo_root() -> Path:
    """The checkout that holds ``primia_lite/``, ``notebooks/`` and ``configs/``."""
    return Path(__file__).resolve().parent.parent


def whole_path(path: str | Path, what: str) -> Path:
    """A path that a user gave, without ``~`` and absolute. ``what`` names it where there is no home folder."""
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:
        raise UserError(f"{what} is {path}, but this user has no home folder: name a folder without ~") from error


def folder_of(variable: str, default: Path) -> Path:
    return whole_path(os.environ[variable], variable) if os.environ.get(variable) else default


def data_root() -> Path:
    """Where films are looked for: ``PRIMIA_LITE_DATA``, or ``data/`` in the checkout."""
    return folder_of("PRIMIA_LITE_DATA", repo_root() / "data")


def cache_dir() -> Path:
    """Resized films and frozen features, safe to delete: ``PRIMIA_LITE_CACHE``, or ``.cache/``."""
    return folder_of("PRIMIA_LITE_CACHE", repo_root() / ".cache")


def runs_dir() -> Path:
    """Checkpoints, stored updates and ledgers of runs: ``PRIMIA_LITE_RUNS``, or ``runs/``."""
    return folder_of("PRIMIA_LITE_RUNS", repo_root() / "runs")


def figures_dir() -> Path:
    """Where ``save_figure`` writes: ``PRIMIA_LITE_FIGURES``, or ``figures/`` in :func:`runs_dir`.

    ``primia-lite run --profile paper`` points it at the committed ``figures/``; everything else leaves that folder
    alone.
    """
    return folder_of("PRIMIA_LITE_FIGURES", runs_dir() / "figures")


def results_dir() -> Path:
    """Where ``write_results`` writes: ``PRIMIA_LITE_RESULTS``, or ``results/`` in :func:`runs_dir`."""
    return folder_of("PRIMIA_LITE_RESULTS", runs_dir() / "results")


def elsewhere(path: str | Path) -> str:
    """How to have a file or folder elsewhere: by the variable that names its folder, if one does."""
    folders = {"CACHE": cache_dir, "FIGURES": figures_dir, "RESULTS": results_dir, "RUNS": runs_dir}
    path = Path(path).resolve()
    name = next((name for name, folder in folders.items() if path.is_relative_to(folder())), None)
    if name is None:
        return "choose another folder"
    if name != "CACHE" and "PRIMIA_LITE_COMMAND" in os.environ:  # in a run, which sets the variables of its notebooks
        return "give `primia-lite run` another folder by --out"
    return set_variable(f"PRIMIA_LITE_{name}")


def set_variable(name: str) -> str:
    return f"set {name} to a folder that can be written"


def check_writable(folder: Path, advice: str | None = None) -> None:
    """Try a folder, or the one in which it would be made, and leave nothing there. The error gives ``advice``, or
    :func:`elsewhere`'s, on how to have another."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))  # a full disk still makes empty files
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} can't be written: {reason}. Mend that, or {advice or elsewhere(folder)}") from error


def load_profile(name: str) -> dict[str, dict]:
    """Read ``configs/<name>.yaml``: ``{notebook stem: {papermill parameter: value}}``."""
    import yaml

    profiles = {path.stem: path for path in sorted((repo_root() / "configs").glob("*.yaml"))}
    if name not in profiles:
        raise UserError(f"unknown profile {name!r}: choose one of {', '.join(profiles)} (configs/*.yaml)")
    try:
        profile = yaml.safe_load(profiles[name].read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"configs/{name}.yaml is not valid YAML: {error}") from error
    known = {p.stem for pattern in ("*.ipynb", "studies/*.ipynb") for p in (repo_root() / "notebooks").glob(pattern)}
    for notebook, parameters in profile.items():
        if notebook not in known:
            raise UserError(f"configs/{name}.yaml: no notebook {notebook!r}; there are {', '.join(sorted(known))}")
        if not isinstance(parameters or {}, dict):
            raise UserError(f"configs/{name}.yaml: {notebook} must map parameter names to values")
    return {notebook: parameters or {} for notebook, parameters in profile.items()}
