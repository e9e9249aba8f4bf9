"""`pytest --layerswap FILE`: what is collected, what fails, and what it says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import parser

# What a run inside of this one imports, pytester forgets: it would be imported each time.
import layerswap.formats.results
import layerswap.linting
import layerswap.onnx_graph.lint
import layerswap.settings  # noqa: F401
from layerswap import catalog, criteria

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytest_plugins = ["pytester"]

MODULE = "layerswap.pytest_plugin"
HEAD = '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> main (float[1,4,8,8] x, float[4] v)'
BODIES = {
    "clean": "y = Relu (x)",
    "left": "y = BatchNormalization (x, v, v, v, v)",
    "custom": "y = mine.Thing (x)",
    "warned": "y = InstanceNormalization <epsilon: float = 0.0> (x, v, v)",
}


@pytest.fixture
def run(pytester, monkeypatch, plugin_options):
    """Runs pytest with the plugin, without this run's own settings."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    # Hypothesis would be imported anew for each run.
    without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return lambda *arguments: pytester.runpytest_inprocess(*plugin_options, *without, *arguments)


@pytest.fixture
def model(pytester):
    """Writes an ONNX file; gives its name."""

    def write(body, name="m.onnx"):
        text = f"{HEAD} => (float[1,4,8,8] y) {{ {BODIES[body]} }}"
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        onnx.save(parser.parse_model(text), path)
        return name

    return write


def rules(**fields):
    wanted = criteria.Criteria(**fields)
    return [rule.code for rule in catalog.RULES if wanted.covers(rule, "onnx")]


def collected(result):
    return [line for line in result.outlines if "::" in line and " " not in line]


def test_it_is_declared():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"layerswap": MODULE}


def test_a_test_for_each_rule(run, model):
    result = run(f"--layerswap={model('clean')}", "--collect-only", "-q")
    assert collected(result) == [f"m.onnx::{code}" for code in rules()]
    result = run("--layerswap=m.onnx")
    result.assert_outcomes(passed=len(rules()))


def test_findings_fail_and_are_shown_without_a_traceback(run, model):
    result = run("--layerswap", model("left"))
    result.assert_outcomes(failed=1, passed=len(rules()) - 1)
    text = result.stdout.str()
    assert "m.onnx: LS101 batchnorm-left\n  error: " in text
    assert "\n  hint: " in text
    assert "Traceback" not in text
    assert ".py:" not in text
    result.stdout.fnmatch_lines(["FAILED m.onnx::LS101*"])


def test_what_nobody_could_decide_fails(run, model):
    result = run(f"--layerswap={model('custom')}", "-rf")
    assert "undetermined: " in result.stdout.str()
    failed = [line.split()[1] for line in result.outlines if line.startswith("FAILED")]
    assert failed == ["m.onnx::LS004"]
    run("--layerswap=m.onnx", "--layerswap-ignore=LS004").assert_outcomes(passed=len(rules()) - 1)


def test_a_warning_passes_and_is_shown(run, model):
    result = run(f"--layerswap={model('warned')}")
    result.assert_outcomes(passed=len(rules()), warnings=1)
    assert "ModelWarning: m.onnx: LS502 missing-epsilon" in result.stdout.str()
    strict = run("--layerswap=m.onnx", "-W", f"error::{MODULE}.ModelWarning")
    strict.assert_outcomes(failed=1, passed=len(rules()) - 1)


def test_a_remark_passes_and_says_nothing(run, model, pytester):
    (pytester.path / "layerswap.toml").write_text('[check.severity]\nLS502 = "info"\n')
    run(f"--layerswap={model('warned')}").assert_outcomes(passed=len(rules()))


@pytest.mark.parametrize("content", [None, b"", b"no model"])
def test_a_file_that_can_t_be_read_is_one_failure(run, pytester, content):
    if content is not None:
        (pytester.path / "m.onnx").write_bytes(content)
    result = run("--layerswap=m.onnx")
    result.assert_outcomes(failed=1, skipped=len(rules()) - 1)
    assert "m.onnx: LS001 unreadable\n  undetermined: " in result.stdout.str()


def test_a_file_that_can_t_be_read_never_passes(run):
    """Also where the test that says so wasn't chosen."""
    run("--layerswap=m.onnx", "-k", "LS101").assert_outcomes(failed=1, deselected=len(rules()) - 1)
    run("--layerswap=m.onnx", "--deselect=m.onnx::LS001").assert_outcomes(
        failed=len(rules()) - 1, deselected=1
    )


# --- what is collected beside it ------------------------------------------------------------


@pytest.fixture
def suite(pytester):
    """A test of the user's own, which counts how often it runs."""
    pytester.makepyfile(
        test_own="""
        from pathlib import Path
        def test_own():
            with open(Path(__file__).with_name("runs.txt"), "a") as file:
                file.write("x")
        """
    )
    return pytester.path / "runs.txt"


@pytest.mark.parametrize("place", ["m.onnx", "models/m.onnx"])
def test_the_suite_runs_as_usual_and_once(run, model, suite, place):
    result = run(f"--layerswap={model('clean', place)}")
    result.assert_outcomes(passed=len(rules()) + 1)
    assert suite.read_text() == "x"


@pytest.mark.parametrize("chosen", ["test_own.py", "test_own.py::test_own"])
def test_paths_choose_tests_of_the_suite_and_the_model_stays(run, model, suite, chosen):
    result = run(chosen, f"--layerswap={model('clean')}")
    result.assert_outcomes(passed=len(rules()) + 1)


def test_a_failed_test_can_be_run_again_by_its_name(run, model, suite):
    result = run(f"--layerswap={model('left')}", "m.onnx::LS101")
    result.assert_outcomes(failed=1)


def test_several_files_and_a_choice_by_keyword(run, model, suite):
    options = [f"--layerswap={model('clean', name)}" for name in ("a.onnx", "b.onnx", "a.onnx")]
    result = run(*options, "-k", "batchnorm-left or (LS004 and b.onnx)", "--collect-only", "-q")
    assert collected(result) == ["a.onnx::LS101", "b.onnx::LS004", "b.onnx::LS101"]


def test_a_file_outside_of_the_project(run, model, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "m.onnx"
    shutil.copy(model("left", "inner.onnx"), outside)
    result = run(f"--layerswap={outside}")
    result.assert_outcomes(failed=1, passed=len(rules()) - 1)
    assert "outside" in result.stdout.str()


def test_a_folder_is_a_saved_model(run, pytester):
    (pytester.path / "saved").mkdir()
    (pytester.path / "saved" / "test_inside.py").write_text("def test_inside(): pass")
    result = run("--layerswap=saved", "--collect-only", "-q")
    assert "saved::LS002" in collected(result)
    assert not any("test_inside" in line for line in collected(result))


def test_in_processes(run, model, suite):
    result = run(f"--layerswap={model('left')}", "-n", "2")
    result.assert_outcomes(failed=1, passed=len(rules()))
    assert "m.onnx: LS101 batchnorm-left" in result.stdout.str()


# --- settings -------------------------------------------------------------------------------


def test_the_options_choose_rules(run, model):
    options = ["--layerswap-select=LS1,LS2", "--layerswap-ignore=LS103"]
    result = run(f"--layerswap={model('clean')}", *options, "--collect-only", "-q")
    expected = rules(select=["LS1", "LS2"], ignore=["LS103"])
    assert collected(result) == [f"m.onnx::{code}" for code in expected]
    assert "m.onnx::LS103" not in collected(result)


def test_the_project_s_settings_count(run, model, pytester):
    (pytester.path / "pyproject.toml").write_text(
        "[tool.pytest.ini_options]\n"
        "[tool.layerswap.check]\n"
        'select = ["LS1", "LS4"]\n'
        'target = ["opencv"]\n'
        '[tool.layerswap.check.overrides."old/*"]\n'
        'ignore = ["LS101"]\n'
    )
    names = [model("left", name) for name in ("new/m.onnx", "old/m.onnx")]
    result = run(*(f"--layerswap={name}" for name in names), "--collect-only", "-q")
    new = rules(select=["LS1", "LS4"], target="opencv")
    assert "LS403" in new
    assert collected(result) == [
        *(f"new/m.onnx::{code}" for code in new),
        *(f"old/m.onnx::{code}" for code in new if code != "LS101"),
    ]


def test_a_wrong_setting_is_a_usage_error(run, model):
    result = run(f"--layerswap={model('clean')}", "--layerswap-select=LS1O1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "'LS1O1'" in result.stderr.str()
    assert "did you mean 'LS101'?" in result.stderr.str()


def test_what_is_missing_to_check_fails_with_its_message(run, model, pytester):
    (pytester.path / "layerswap.toml").write_text('[check]\nruntime = "reference"\n')
    result = run(f"--layerswap={model('clean')}", "-k", "LS801")
    result.assert_outcomes(failed=1, deselected=len(rules(runtime="reference")) - 1)
    assert "Traceback" not in result.stdout.str()


def test_nothing_is_imported_before_a_file_is_named(tmp_path, plugin_options):
    (tmp_path / "test_names.py").write_text(
        "import sys\n"
        "def test_names():\n"
        "    names = {name.partition('.')[0] for name in sys.modules}\n"
        "    assert 'layerswap' in names\n"
        "    assert not names & {'numpy', 'pydantic', 'rich', 'click', 'onnx', 'tensorflow'}\n"
    )
    # Other plugins of this machine may import what they like.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", *(plugin_options or ["-p", "layerswap"])]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
