"""What an install and CI stand on."""

import os
import re
import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rto_megatron

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    """The arguments that setup.py gives to setuptools."""
    given = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return given


@pytest.fixture
def pins():
    """Package name -> its requirement in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_apex_of_pypi_is_never_required(setup, pins):
    listed = names(setup["install_requires"]).union(*map(names, setup["extras_require"].values()), pins)
    assert "apex" not in listed, "PyPI's 'apex' is not NVIDIA's; the Dockerfile builds NVIDIA's from source"


def test_every_requirement_is_pinned(setup, pins):
    extras = [setup["extras_require"][extra] for extra in ("demo", "dev")]
    missing = names(setup["install_requires"]).union(*map(names, extras)) - set(pins)
    assert not missing, f"{sorted(missing)} have no line in constraints.txt; add the version that was tried"


def test_pins_are_exact_and_fit_every_build(pins):
    loose = [str(pin) for pin in pins.values() if not re.fullmatch(r"==[0-9.]+", str(pin.specifier))]
    assert not loose, f"{loose}: write name==version, without a local version such as +cpu"


def test_pins_satisfy_the_ranges_of_setup(setup, pins):
    for requirement in map(Requirement, setup["install_requires"]):
        version = str(pins[canonicalize_name(requirement.name)].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), (
            f"constraints.txt pins {version}, setup.py asks for {requirement}"
        )


def test_makefile_installs_the_torch_that_is_pinned(pins):
    default = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert default == str(pins["torch"])


def test_setup_tells_the_version_of_the_package(setup):
    assert setup["version"] == rto_megatron.__version__


def test_every_folder_of_code_is_installed(setup):
    folders = {path.parent for path in (ROOT / "rto_megatron").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    missing = packages - set(setup["packages"])
    assert not missing, f"{sorted(missing)} would be left out of an install; give each an __init__.py"


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK), "chmod +x .ci/run"
    assert "make test" in script.read_text()


@pytest.mark.parametrize("target", ["venv", "quickstart", "test", "test-all", "lint", "golden", "gpu-check"])
def test_makefile_has_the_documented_targets(target):
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and "APPENDIX" in text
