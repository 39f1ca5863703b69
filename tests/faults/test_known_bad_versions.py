"""Dependencies: no version that is known to be bad is pinned, locked, or let in by a range."""

import tomllib
from collections import defaultdict

import pytest
from conftest import ROOT
from known_bad_versions import KNOWN_BAD
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


def installable() -> dict[str, dict[str, set[str]]]:
    """Package -> where a version of it is named -> those versions; of a range, the lowest that it lets in."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in ("requirements.txt", "requirements-test.txt", "requirements.lock"):
        for line in (ROOT / name).read_text().splitlines():
            package, sign, version = line.partition("#")[0].strip().partition("==")
            if sign:
                found[canonicalize_name(package)][name].add(version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)):
        range_ = Requirement(line)
        floors = {one.version for one in range_.specifier if one.operator in (">=", "==", "~=")}
        assert floors, f"{line} has no floor"
        found[canonicalize_name(range_.name)]["pyproject.toml"] |= floors
    return found


@pytest.mark.parametrize(("package", "bad", "told", "why"), KNOWN_BAD, ids=lambda text: text[:30])
def test_no_version_that_is_known_to_be_bad_can_be_installed(package: str, bad: str, told: str, why: str) -> None:
    places = installable()[canonicalize_name(package)]
    assert places, f"{package} is no dependency any more: remove it from the table"
    for place, versions in places.items():
        for version in versions:
            assert not SpecifierSet(bad).contains(version, prereleases=True), f"{place}: {package} {version}: {why} ({told})"


def test_the_lock_has_every_package_of_the_table() -> None:
    """What only comes along has no range here: the lock alone keeps a bad version out."""
    locked = {package for package, places in installable().items() if "requirements.lock" in places}
    assert {canonicalize_name(package) for package, *_ in KNOWN_BAD} <= locked
    assert all(Version(version) for places in installable().values() for versions in places.values() for version in versions)
