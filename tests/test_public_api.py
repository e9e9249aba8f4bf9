"""The names that users import, and what each of them promises."""

import inspect
import pickle
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import layerswap as ls
from layerswap import errors

CLASSES = ("Converted", "Criteria", "LayerswapError", "Policy", "Report")
FUNCTIONS = sorted(set(ls.__all__) - set(CLASSES))
PROMISED = {"convert", "export", "load", "plan", "swap", "verify", *CLASSES}
EXIT_CODES = {
    "LayerswapError": 3,
    "LoadError": 3,
    "UsageError": 2,
    "PolicyError": 2,
    "UnsupportedModelError": 1,
    "IndivisibleChannelsError": 1,
    "TransferError": 1,
    "ExportError": 3,
    "ParityError": 1,
    "MissingExtraError": 3,
}


def test_the_public_names():
    assert set(ls.__all__) >= PROMISED
    assert ls.__all__ == sorted(set(ls.__all__))


@pytest.mark.parametrize("name", ls.__all__)
def test_every_name_is_what_its_home_calls_so(name):
    thing = getattr(ls, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("layerswap.")
    assert inspect.isclass(thing) == (name in CLASSES)


def test_a_star_import_gives_exactly_these():
    names = {}
    exec("from layerswap import *", names)
    assert set(names) - {"__builtins__"} == set(ls.__all__)


def test_type_checkers_see_the_same_names():
    source = inspect.getsource(ls)
    seen = dict(re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.MULTILINE))
    pairs = re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.MULTILINE)
    assert seen
    assert {name: home for home, name in pairs} == ls._HOMES


def test_dir_lists_the_names_and_the_version():
    assert set(dir(ls)) >= {*ls.__all__, "__version__"}


def test_the_version_is_the_distribution_s():
    assert ls.__version__ == version("layerswap")


@pytest.mark.parametrize("name", ["no_such", "checks", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'layerswap' has no attribute '{name}'"):
        getattr(ls, name)


def test_the_package_is_typed():
    assert Path(ls.__file__).with_name("py.typed").is_file()


def parameters(function):
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_function_is_documented(name):
    text = inspect.getdoc(getattr(ls, name))
    assert re.match(r"[A-Z].*\.(\n|$)", text)
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+(?:, \w+)*):", section, re.MULTILINE)
    names = [word for group in documented for word in group.split(", ")]
    assert sorted(names) == sorted(parameters(getattr(ls, name)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_errors_that_a_function_names_exist(name):
    section = inspect.getdoc(getattr(ls, name)).partition("Raises:\n")[2]
    named = re.findall(r"\b\w+Error\b", section)
    assert named
    assert set(named) <= set(EXIT_CODES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_described(name):
    kind = getattr(ls, name)
    text = inspect.getdoc(kind)
    assert text
    fields = {
        "Converted": ["model", "plan", "transfer", "source"],
        "Criteria": list(getattr(kind, "model_fields", ())),
        "LayerswapError": ["message", "where", "hint"],
        "Policy": list(getattr(kind, "model_fields", ())),
        "Report": ["ok", "exit_code", "seconds"],
    }[name]
    for field in fields:
        assert re.search(rf"\b{field}\b", text), f"{name}.{field} isn't described"


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, Exception)]
)
def test_every_error_comes_whole_from_another_process(kind):
    if kind is errors.MissingExtraError:
        error = kind("openvino", "openvino", "running a file")
    else:
        error = kind("no such layer", where="a/b", hint="Look again.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_exit_code_of_every_error():
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    assert found == EXIT_CODES
    assert all(issubclass(getattr(errors, name), ls.LayerswapError) for name in found)


def test_an_error_says_where_what_and_how_on():
    error = errors.LoadError("is damaged", where="m.keras", hint="Copy it again.")
    assert str(error) == "m.keras: is damaged\nCopy it again."
    assert str(errors.LoadError("is damaged")) == "is damaged"
    assert error.code == "load"
    assert errors.IndivisibleChannelsError("x").code == "indivisible-channels"


def test_a_missing_extra_says_how_to_install_it():
    error = errors.MissingExtraError("onnxruntime", "runtime", "running an ONNX file")
    assert (error.package, error.extra) == ("onnxruntime", "runtime")
    assert "pip install 'layerswap[runtime]'" in str(error)
