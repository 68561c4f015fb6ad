"""pyproject.toml, requirements.lock and environment.yml hold the same pins, and the lock is complete."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What a pinned package asks for and we leave out, on purpose.
LEFT_OUT = {("medmnist", "torchvision"): "never imported; would bring another torch of several GB"}
# torch is installed first, with its dependencies: a CUDA build brings these itself, at versions of its own.
CUDA = ("nvidia-", "cuda-", "triton")
REQUIRED = {
    *("torch", "opacus", "syft", "tenseal", "matplotlib", "seaborn"),
    *("ipywidgets", "jupyterlab", "papermill", "nbval"),
}


def pin(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} isn't an exact pin"
    return specifier.version


@pytest.fixture(scope="module")
def lock(root) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.lock").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(r.name) for r in requirements]
    assert len(set(names)) == len(names), "a package is pinned twice"
    assert names == sorted(names)
    return dict(zip(names, requirements, strict=True))


@pytest.fixture(scope="module")
def project(root) -> dict[str, str]:
    content = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = [content["dependencies"], *content["optional-dependencies"].values()]
    return {canonicalize_name(r.name): pin(r) for group in groups for r in map(Requirement, group)}


def test_every_pin_is_exact(lock):
    assert all(pin(r) for r in lock.values())


def test_pyproject_agrees_with_the_lock(project, lock):
    assert project == {name: pin(lock[name]) for name in project}
    assert not [name for name in project if lock[name].marker], "what we ask for is needed everywhere"


def test_environment_yml_agrees_with_pyproject(root, project):
    content = yaml.safe_load((root / "environment.yml").read_text())
    assert "python=3.11" in content["dependencies"] and "pip" in content["dependencies"]
    (pip,) = [d["pip"] for d in content["dependencies"] if isinstance(d, dict)]
    assert pip[0] == "-c requirements.lock", "transitive packages come at the lock's versions"
    pins = {canonicalize_name(r.name): pin(r) for r in map(Requirement, pip[1:])}
    assert set(pins) >= REQUIRED
    build = {"flit-core"}  # pip install --no-build-isolation -e .
    alone = {package for package, _ in LEFT_OUT}
    assert {n: v for n, v in pins.items() if n not in build} == {n: v for n, v in project.items() if n not in alone}
    for package in alone:
        assert f"--no-deps {package}=={project[package]}" in (root / "environment.yml").read_text()


@pytest.mark.parametrize("page", ["README.md", "environment.yml"])
def test_versions_in_the_documentation_are_the_locks(root, lock, page):
    quoted = re.findall(r"\b([A-Za-z][\w.-]*)==(\d[\w.]*)", (root / page).read_text())
    assert quoted
    pins = {name: pin(r) for name, r in lock.items()}
    assert [
        (n, v) for n, v in quoted if canonicalize_name(n) != "flit-core" and pins.get(canonicalize_name(n)) != v
    ] == []


def test_the_lock_is_what_is_installed(lock):
    wanted = {n: pin(r) for n, r in lock.items() if r.marker is None or r.marker.evaluate()}
    installed = {canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()}
    assert wanted == {name: installed.get(name) for name in wanted}


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_all_that_its_packages_ask_for(lock, platform, python):
    """By the metadata of what is installed here; a package only of another platform can't be looked into."""
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "platform_system": {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}[platform],
        "os_name": "nt" if platform == "win32" else "posix",
    }

    def applies(requirement: Requirement, extra: str = "") -> bool:
        return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})

    here = {name: pin(r) for name, r in lock.items() if applies(r)}
    wrong = []
    for name in here:
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            needed = canonicalize_name(requirement.name)
            if not applies(requirement) or (name, needed) in LEFT_OUT:
                continue
            if name == "torch" and needed.startswith(CUDA):
                continue
            if needed not in here or not requirement.specifier.contains(here[needed], prereleases=True):
                wrong.append(f"{name} asks for {requirement}; the lock has {here.get(needed)}")
    assert not wrong, "\n".join(wrong)


def test_torch_is_left_alone_and_no_index_is_named(root, lock):
    assert "torchvision" not in lock
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile", ".github/workflows/ci.yml"):
        assert not re.search(r"index-url +http|download\.pytorch|pypi\.org", (root / name).read_text()), name
