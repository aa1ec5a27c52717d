"""pyproject.toml, requirements.txt and environment.yml say the same."""

import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nodules.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(name):
    lines = re.findall(r"^(\S+==[^\\\n]+?) *\\$", (ROOT / name).read_text(), re.M)
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(
    ("lock", "declared"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]),
        ("requirements-weights.txt", PROJECT["dependency-groups"]["weights"]),
        ("requirements-data.txt", PROJECT["dependency-groups"]["data"]),
        ("requirements-teaching.txt", PROJECT["dependency-groups"]["teaching"]),
    ],
)
def test_the_lock_holds_every_direct_dependency_in_a_fitting_version(lock, declared):
    pins = {}
    for pin in locked(lock):
        pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    for requirement in map(Requirement, declared):
        versions = pins[canonicalize_name(requirement.name)]
        assert all(requirement.specifier.contains(version) for version in versions), requirement


@pytest.mark.parametrize("lock", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_the_lock_has_a_hash_for_every_pin_and_no_address(lock):
    text = (ROOT / lock).read_text()
    blocks = re.split(r"^(?=\S)", text, flags=re.M)[1:]
    assert len(blocks) == len(locked(lock)) > 0
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text and "--index" not in text


def test_conda_installs_exactly_the_lock_and_the_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *pins, package = environment["dependencies"][-1]["pip"]
    assert package == "-e ." and environment["name"] == PROJECT["project"]["name"]
    assert [str(Requirement(pin)) for pin in pins] == [str(pin) for pin in locked("requirements.txt")]
    (python,) = [item for item in environment["dependencies"] if str(item).startswith("python=")]
    assert Requirement(f"x{PROJECT['project']['requires-python']}").specifier.contains(python.split("=")[1] + ".0")


def test_every_direct_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    for group in (PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"].values()):
        for requirement in group:
            assert re.search(rf'"{re.escape(requirement)}", +# .*\w', text), requirement
