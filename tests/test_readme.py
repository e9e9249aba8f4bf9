"""Runs what the documents say: every command, every Python snippet, every number."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from layerswap.cli.converting import export_model, plan
from layerswap.cli.judging import check
from layerswap.comparison import DEFAULT_TOLERANCES
from layerswap.criteria import Criteria
from layerswap.options import ExportOptions
from layerswap.policy import Policy
from layerswap.records import PROFILE_OPSETS
from layerswap.settings import read_criteria, read_policy

ROOT = Path(__file__).parent.parent
# Options of most commands, described in the README.
SHARED = {
    o for p in plan.params for o in p.opts if {p.name} & {"output_file", "report_format", "force"}
} | {"--config", "--custom-objects", "--debug", "--help", "--quiet", "--unsafe", "-q"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the files that the README's examples name."""
    shutil.copy(ROOT / "fixtures" / "digits_bn.keras", tmp_path / "model.keras")
    shutil.copy(ROOT / "fixtures" / "digits_test.npz", tmp_path / "digits.npz")
    np.save(tmp_path / "samples.npy", np.load(tmp_path / "digits.npz")["x_train"][:64])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_s_commands_run_in_order(workplace, capfd):
    from layerswap.__main__ import run

    commands = [
        line.removeprefix("$ ")
        for block in blocks(README, "console")
        for line in block.splitlines()
    ]
    assert len(commands) > 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "layerswap"
        assert run(arguments) == 0, f"{command}\n{capfd.readouterr().err}"
    for name in ("model_gn.onnx", "model_gn.keras", "model_gn", "small.onnx", "report.json"):
        assert (workplace / name).exists()


@pytest.mark.parametrize("snippet", blocks(README, "python"), ids=lambda s: s.split("\n")[0])
def test_the_readme_s_python_runs(snippet, workplace):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_s_first_commands_are_targets_of_make():
    shell = [line for block in blocks(README, "sh") for line in block.splitlines()]
    targets = [line.split()[1] for line in shell if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        dry = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert dry.returncode == 0, dry.stderr
    assert [line for line in shell if line.startswith("pip ")] == ["pip install '.[all]'"]


def test_the_demo_prints_what_the_readme_shows(workplace):
    shown = README.split("<!-- demo -->")[1]
    (block,) = blocks(shown.split("## Install")[0], "text")
    command = [sys.executable, "-m", "layerswap", "demo"]
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line[:1] in ("┃", "│")]
    assert len(printed) == len(block.splitlines())
    for ours, theirs in zip(block.splitlines(), printed, strict=True):
        words, numbers = split_numbers(ours)
        assert words == split_numbers(theirs)[0]
        # A share of 450 digits: another machine's rounding may turn a few.
        assert numbers == pytest.approx(split_numbers(theirs)[1], abs=2.0)


def split_numbers(line):
    numbers = [float(n) for n in re.findall(r"([\d.]+)%", line)]
    return re.sub(r"\s*[\d.]+%", " %", line).split(), numbers


def test_the_tolerances_in_the_documents_are_those_in_force():
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").split("<!-- tolerances -->")[1]
    rows = re.findall(r"^\| (\w+) \| ([\d.e-]+) \| ([\d.e-]+) \|$", text, re.MULTILINE)
    documented = {name: (float(a), float(r)) for name, a, r in rows}
    assert documented == {n: (t.absolute, t.relative) for n, t in DEFAULT_TOLERANCES.items()}


def test_the_policy_s_document_names_every_field_and_its_toml_is_valid(tmp_path):
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    documented = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    )
    assert documented == set(Policy.model_fields)
    (toml,) = blocks(text, "toml")
    (tmp_path / "layerswap.toml").write_text(toml)
    assert read_policy({}, None, tmp_path).groups == 16


def test_the_check_s_document_names_every_option_and_its_toml_is_valid(tmp_path):
    text = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]*)\|([^|]*)\|", text, re.MULTILINE)
    options = {name for row in rows for name in re.findall(r"--\w[\w-]*", row[0])}
    offered = {o for p in check.params for o in p.opts if o.startswith("--")}
    assert options | {"--load", "--jobs"} == offered - SHARED
    assert {"--load", "--jobs"} <= set(re.findall(r"--[\w-]+", text))
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[1])} == set(
        Criteria.model_fields
    )
    (toml,) = blocks(text, "toml")
    (tmp_path / "layerswap.toml").write_text(toml)
    criteria = read_criteria({}, None, tmp_path)
    assert criteria.policy.groups == 8
    assert criteria.severity_of("LS204") == "error"
    assert criteria.for_file("legacy/a/b.onnx").ignore == ("LS2", "LS701")


def test_the_export_s_document_names_every_option_and_every_form():
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in re.findall(r"^\| (`--.*) \|$", text, re.MULTILINE)]
    options = {name for row in rows for name in re.findall(r"--[\w-]+", row[0])}
    offered = {o for p in export_model.params for o in p.opts if o.startswith("--")}
    assert options == offered - SHARED
    arguments = {name.split("=")[0] for row in rows for name in re.findall(r"`(\w+)", row[1])}
    arguments |= {o.removeprefix("--").replace("-", "_") for o in options if "nchw" in o}
    assert arguments == set(ExportOptions.model_fields) - {"overwrite"}
    forms = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \| [^|]* \|$", text, re.MULTILINE)
    assert {form: int(opset) for form, opset in forms} == PROFILE_OPSETS


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
