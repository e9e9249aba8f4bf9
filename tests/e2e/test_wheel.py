"""The built distributions: what they hold, and that the demo finds its files in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEMO_FILES = ("digits_bn.keras", "digits_test.npz")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(distributions, tmp_path_factory):
    """Folder that holds the wheel's contents, as site-packages would."""
    (wheel,) = distributions.glob("*.whl")
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_in(folder, unpacked, *arguments):
    """Runs this interpreter in `folder` with the wheel's layerswap instead of the checkout's."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_holds_the_package_and_nothing_else(unpacked):
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "layerswap").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "layerswap/py.typed" in sources
    packed = {
        path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()
    }
    metadata = {name for name in packed if name.split("/")[0].endswith(".dist-info")}
    assert packed - metadata == sources | {f"layerswap/_demo/{name}" for name in DEMO_FILES}
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_wheel_holds_the_fixtures_bytes(unpacked):
    for name in DEMO_FILES:
        packed = unpacked / "layerswap" / "_demo" / name
        assert packed.read_bytes() == (REPOSITORY / "fixtures" / name).read_bytes()


def test_sdist_holds_fixtures_and_tests(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("layerswap", "tests", "fixtures", "benchmarks"):
        sources = {
            path.relative_to(REPOSITORY).as_posix()
            for path in (REPOSITORY / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert sources
        assert sources <= packed
    assert {"LICENSE", "README.md", "Makefile", "pyproject.toml"} <= packed


def test_demo_finds_its_files_in_the_wheel(unpacked, tmp_path):
    code = (
        "from layerswap import demo; print(demo.find_file(demo.MODEL_NAME)); "
        "print(demo.find_file(demo.DIGITS_NAME))"
    )
    found = [Path(line) for line in run_in(tmp_path, unpacked, "-c", code).splitlines()]
    assert found == [unpacked / "layerswap" / "_demo" / name for name in DEMO_FILES]


def test_demo_finds_its_files_in_a_checkout():
    from layerswap import demo

    for name in DEMO_FILES:
        assert demo.find_file(name) == REPOSITORY / "fixtures" / name


def test_demo_runs_from_the_wheel_outside_the_repository(unpacked, tmp_path):
    for options in ([], ["--finetune"]):  # the second run overwrites the first one's output
        printed = run_in(tmp_path, unpacked, "-m", "layerswap", "demo", *options)
        assert "Verified in" in printed
        assert ("SGD, learning rate" in printed) == bool(options)
    written = {path.name for path in (tmp_path / "demo-output").iterdir()}
    assert written == {"digits_gn.onnx", "digits_gn.onnx.ref.npz"}
