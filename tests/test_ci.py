"""`docs/ci.md` and the hook of pre-commit: valid by others' schemas, and run as they would."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import yaml
from junitparser import JUnitXml
from onnx import parser

from layerswap.criteria import Criteria
from layerswap.formats import FORMATS
from layerswap.settings import read_criteria
from schemas import GITLAB, SARIF, WORKFLOW, problems

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
HOOKS = ROOT / ".pre-commit-hooks.yaml"
# Where the console scripts of this environment are, and no repository but the test's own.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def block(heading, language):
    (section,) = (part for part in PAGE.split("\n## ") if part.startswith(heading))
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return found


def workflow():
    read = yaml.safe_load(block("GitHub", "yaml"))
    return {"on" if key is True else key: value for key, value in read.items()}  # YAML 1.1


def write(path, body):
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    main (float[1,2] x, float[2] v) => (float[1,2] y) {{ {body} }}"""
    Path(path).parent.mkdir(exist_ok=True)
    onnx.save(parser.parse_model(text), path)


def clean(path):
    write(path, "y = Relu (x)")


def left(path):
    write(path, "y = BatchNormalization (x, v, v, v, v)")


def shell(line):
    return subprocess.run(
        ["bash", "-ec", line], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_format_is_explained():
    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == FORMATS


# --- GitHub and GitLab ----------------------------------------------------------------------


def test_the_workflow_is_valid():
    assert problems(workflow(), WORKFLOW) == []
    assert problems({**workflow(), "jobs": {"check": {"steps": "none"}}}, WORKFLOW) != []


def steps():
    (job,) = workflow()["jobs"].values()
    return {s["run"]: s for s in job["steps"] if s.get("run", "").startswith("layerswap ")}


@pytest.mark.parametrize("make", [clean, left])
def test_the_workflow_s_commands_run(make, tmp_path):
    clean("models/first.onnx")
    make("models/second.onnx")
    wrong = make is left
    verdicts = []
    for line, step in steps().items():
        done = shell(line)
        assert done.stderr == ""
        assert done.returncode == int(wrong)
        if not step.get("continue-on-error"):
            verdicts.append(done.stdout)
    log = json.loads((tmp_path / "layerswap.sarif").read_text())
    assert problems(log, SARIF) == []
    assert len(log["runs"][0]["results"]) == int(wrong)
    (text,) = verdicts  # a step that only reports mustn't be the one that fails the job
    assert text.startswith("::error file=models/second.onnx,title=LS101") == wrong


def test_a_folder_without_models_fails():
    """The shell leaves a glob as it is where nothing matches."""
    for line in steps():
        assert shell(line).returncode == 3


def test_the_report_is_where_the_upload_looks_for_it():
    (job,) = workflow()["jobs"].values()
    (upload,) = [s for s in job["steps"] if s.get("uses", "").endswith("upload-sarif@v3")]
    assert any(f"--output-file {upload['with']['sarif_file']}" in line for line in steps())


def test_gitlab_s_job_is_valid_and_its_command_runs():
    jobs = yaml.safe_load(block("GitLab", "yaml"))
    assert problems(jobs, GITLAB) == []
    (job,) = jobs.values()
    left("models/m.onnx")
    (line,) = [line for line in job["script"] if line.startswith("layerswap ")]
    assert shell(line).returncode == 1
    assert JUnitXml.fromfile(job["artifacts"]["reports"]["junit"]).failures == 1


# --- pre-commit -----------------------------------------------------------------------------


def pre_commit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", *arguments],
        env={**ENVIRONMENT, "PRE_COMMIT_HOME": str(Path.cwd() / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_manifest_is_valid():
    done = pre_commit("validate-manifest", str(HOOKS))
    assert done.returncode == 0, done.stdout


def test_the_configuration_is_valid_and_its_arguments_are_rules():
    Path("config.yaml").write_text(block("pre-commit", "yaml"))
    done = pre_commit("validate-config", "config.yaml")
    assert done.returncode == 0, done.stdout
    (repository,) = yaml.safe_load(block("pre-commit", "yaml"))["repos"]
    (hook,) = repository["hooks"]
    (own,) = yaml.safe_load(HOOKS.read_text())
    assert hook["id"] == own["id"]
    assert run_hook(args=hook["args"], make=clean).returncode == 0


def run_hook(make, **fields):
    """pre-commit itself, with what the manifest says; not in an environment of the hook's own."""
    (hook,) = yaml.safe_load(HOOKS.read_text())
    hook |= {"language": "system", "verbose": True, **fields}
    config = {"repos": [{"repo": "local", "hooks": [hook]}]}
    Path(".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    make("models/a b.onnx")
    Path("notes.onnx.txt").write_text("no model")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(
        ["git", "add", "models", "notes.onnx.txt", ".pre-commit-config.yaml"], check=True
    )
    return pre_commit("run", "--all-files")


@pytest.mark.skipif(shutil.which("git") is None, reason="pre-commit needs git")
@pytest.mark.parametrize(("make", "code"), [(clean, 0), (left, 1)])
def test_the_hook_checks_the_models_of_a_commit(make, code):
    done = run_hook(make)
    assert done.returncode == code, done.stdout
    assert "models/a b.onnx" in done.stdout
    assert "notes" not in done.stdout
    assert ("LS101" in done.stdout) == bool(code)


def test_the_hook_takes_what_check_reads():
    from layerswap.keras_files import KERAS_SUFFIXES

    (hook,) = yaml.safe_load(HOOKS.read_text())
    for suffix in (".onnx", *KERAS_SUFFIXES):
        assert re.search(hook["files"], f"models/m{suffix}")
    assert not re.search(hook["files"], "models/m.onnx.data")


# --- pytest ---------------------------------------------------------------------------------


def test_the_settings_are_valid(tmp_path):
    (tmp_path / "pyproject.toml").write_text(block("pytest", "toml"))
    assert read_criteria({}, None, tmp_path) == Criteria(ignore=["LS204"])


def test_the_pytest_command_runs(plugin_options):
    clean("model.onnx")
    shutil.copy(ROOT / "fixtures" / "digits_bn.keras", "other.keras")
    options = " ".join([*plugin_options, "-p no:cacheprovider"])
    done = shell(f"{block('pytest', 'sh').strip()} {options}")
    assert "FAILED other.keras::LS101" in done.stdout
    assert "1 failed" in done.stdout


def test_the_assertions_run(digits_onnx, monkeypatch):
    monkeypatch.chdir(digits_onnx.parent)
    for file in digits_onnx.parent.iterdir():
        file.rename(file.name.replace("digits", "model"))
    names = {}
    exec(compile(block("pytest", "python"), "ci.md", "exec"), names)
    names["test_the_model"]()
