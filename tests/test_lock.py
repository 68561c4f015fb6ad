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
from packaging.version import Version

# What flwr 1.41.0 asks to be older than the lock has it: the only packages on which the two locks differ. Of these,
# pyproject.toml gives ranges for what we use ourselves, so that pip can install the extra.
HELD_BACK = {"packaging", "protobuf", "rich", "starlette", "uvicorn"}
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


def read_lock(path) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(r.name) for r in requirements]
    assert len(set(names)) == len(names), "a package is pinned twice"
    assert names == sorted(names)
    return dict(zip(names, requirements, strict=True))


@pytest.fixture(scope="module")
def lock(root) -> dict[str, Requirement]:
    return read_lock(root / "requirements.lock")


@pytest.fixture(scope="module")
def flower_lock(root) -> dict[str, Requirement]:
    return read_lock(root / "requirements-flower.lock")


@pytest.fixture(scope="module")
def docs_lock(root) -> dict[str, Requirement]:
    return read_lock(root / "requirements-docs.lock")


@pytest.fixture(scope="module")
def pyproject(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def project(pyproject, lock) -> dict[str, str]:
    """What pyproject.toml pins, but for Flower and the site; of what it gives a range for, the lock's."""
    extras = pyproject["optional-dependencies"]
    groups = [
        pyproject["dependencies"],
        *(extras[name] for name in extras if name != "docs" and not name.startswith("flower")),
    ]
    found = {}
    for requirement in (Requirement(text) for group in groups for text in group):
        name = canonicalize_name(requirement.name)
        found[name] = pin(lock[name]) if name in HELD_BACK else pin(requirement)
    return found


def test_every_pin_is_exact(lock):
    assert all(pin(r) for r in lock.values())


def test_pyproject_agrees_with_the_lock(project, lock):
    assert project == {name: pin(lock[name]) for name in project}
    assert not [name for name in project if lock[name].marker], "what we ask for is needed everywhere"


def test_flower_s_lock_differs_from_the_lock_only_where_it_must(lock, flower_lock):
    assert all(pin(r) for r in flower_lock.values())
    assert lock.keys() & flower_lock.keys() == HELD_BACK
    assert [name for name in HELD_BACK if Version(pin(flower_lock[name])) >= Version(pin(lock[name]))] == []


def test_the_extras_pin_flower_and_pip_can_install_them(pyproject, lock, flower_lock):
    extras = {name: Requirement(*pyproject["optional-dependencies"][name]) for name in ("flower", "flower-simulation")}
    assert all(r.name == "flwr" and pin(r) == pin(flower_lock["flwr"]) for r in extras.values())
    assert extras["flower"].extras == set() and extras["flower-simulation"].extras == {"simulation"}
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, pyproject["dependencies"])}
    for name in HELD_BACK & ranges.keys():
        assert ranges[name].contains(pin(lock[name])) and ranges[name].contains(pin(flower_lock[name])), name


def test_the_site_s_lock_adds_to_the_lock_and_has_what_the_extra_asks_for(pyproject, lock, docs_lock):
    assert lock.keys() & docs_lock.keys() == set()
    extra = {canonicalize_name(r.name): pin(r) for r in map(Requirement, pyproject["optional-dependencies"]["docs"])}
    assert extra == {name: pin(docs_lock[name]) for name in extra}


@pytest.mark.flower
def test_flower_s_lock_is_what_is_installed_and_has_all_that_its_packages_ask_for(lock, flower_lock):
    both = {n: pin(r) for n, r in {**lock, **flower_lock}.items() if r.marker is None or r.marker.evaluate()}
    assert {name: metadata.version(name) for name in flower_lock if name in both} == {
        name: both[name] for name in flower_lock if name in both
    }
    wrong = []
    for name in flower_lock.keys() & both.keys():
        wanted = {"uvicorn": "standard", "sqlalchemy": "asyncio"}.get(name, "")
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                found = both.get(canonicalize_name(requirement.name))
                if found is None or not requirement.specifier.contains(found, prereleases=True):
                    wrong.append(f"{name} asks for {requirement}; the locks have {found}")
    assert wrong == []


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


@pytest.mark.parametrize("page", ["docs/install.md", "environment.yml"])
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
