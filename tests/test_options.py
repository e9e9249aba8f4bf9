"""What `ExportOptions` takes and refuses."""

from __future__ import annotations

from typing import get_args

import pytest

from layerswap.errors import UsageError
from layerswap.options import ExportOptions, GroupNormForm, split_fields
from layerswap.records import PROFILE_OPSETS


def test_every_form_has_a_lowest_opset():
    assert set(get_args(GroupNormForm)) == set(PROFILE_OPSETS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opset": 12}, "opset must be an integer, 13 or above, not 12"),
        ({"opset": True}, "opset must be an integer, 13 or above, not True"),
        ({"opset": "18"}, "opset must be an integer, 13 or above, not '18'"),
        ({"groupnorm": "fast"}, "groupnorm must be 'portable', 'plain'"),
        ({"groupnrm": "plain"}, "unknown field 'groupnrm'; did you mean 'groupnorm'?"),
        ({"external_data": "yes"}, "external_data must be 'auto', 'always' or 'never'"),
        ({"fp16": 1}, "fp16 must be a valid boolean"),
        ({"input_shape": (0, 3)}, "one positive integer, or None where it stays open"),
        ({"input_shape": (1.5, 3)}, "one positive integer, or None where it stays open"),
        ({"input_shape": ()}, "one positive integer, or None where it stays open"),
        ({"input_shape": "1,2"}, "one positive integer, or None where it stays open"),
        ({"input_shape": {"a": 3}}, "one positive integer, or None where it stays open"),
        ({"format": "tflite"}, "format must be 'keras', 'h5', 'savedmodel' or 'onnx'"),
        ({"inputs_as_nchw": 3}, "inputs_as_nchw must be a valid tuple, not 3"),
    ],
)
def test_a_wrong_value_is_named(fields, message):
    with pytest.raises(UsageError) as caught:
        ExportOptions(**fields)
    assert message in caught.value.message


def test_names_and_shapes_come_in_several_forms():
    assert ExportOptions(inputs_as_nchw=True).inputs_as_nchw == ("all",)
    assert ExportOptions(inputs_as_nchw="x").inputs_as_nchw == ("x",)
    assert ExportOptions(outputs_as_nchw=["x", "y"]).outputs_as_nchw == ("x", "y")
    assert ExportOptions(outputs_as_nchw=None).outputs_as_nchw == ()
    assert ExportOptions(input_shape=[1, None]).input_shape == {"all": (1, None)}
    assert ExportOptions(input_shape={"x": [2, 3]}).input_shape == {"x": (2, 3)}
    assert ExportOptions(input_shape=None).input_shape == {}


@pytest.mark.parametrize(
    ("path", "fields", "kind"),
    [
        ("m.onnx", {}, "onnx"),
        ("m.KERAS", {"format": "onnx"}, "onnx"),
        ("m.h5", {}, "h5"),
        ("m.hdf5", {}, "h5"),
        ("folder", {}, "savedmodel"),
        ("m.onnx", {"format": "savedmodel"}, "savedmodel"),
    ],
)
def test_the_format_follows_from_the_suffix_or_is_given(path, fields, kind):
    assert ExportOptions(**fields).for_path(path).format == kind


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("m.pt", {}, "unknown suffix '.pt'"),
        ("m.keras", {"opset": 18}, "opset is an option for the format onnx, not for keras"),
        ("m.onnx", {"fp16": True, "target_runtime": "onnxruntime"}, "float32, not fp16"),
        ("m.onnx", {"keep_failed": True, "verify": False}, "nothing to keep where verify is off"),
        ("here/.onnx", {}, "'.onnx' is a suffix without a name"),
        ("m.onnx", {"format": "keras"}, "a file in the format keras needs the suffix .keras"),
        ("m.keras", {"groupnorm": "plain"}, "groupnorm is an option for the format onnx"),
        ("m.h5", {"opset": 17}, "opset is an option for the format onnx, not for h5"),
        ("folder", {"fp16": True}, "fp16 is an option for the format onnx, not for savedmodel"),
        ("m.onnx", {"serving_only": True}, "serving_only is an option for the format savedmodel"),
        ("m.keras", {"serving_only": True}, "serving_only is an option for the format savedmodel"),
        (
            "m.onnx",
            {"groupnorm": "plain", "target_runtime": "onnxruntime"},
            "target_runtime tunes the form",
        ),
        (
            "folder",
            {"target_runtime": "onnxruntime"},
            "target_runtime is an option for the format onnx",
        ),
        ("m.onnx", {"groupnorm": "native", "opset": 20}, "needs opset 21 or above, not 20"),
    ],
)
def test_an_option_that_does_not_fit_the_format_is_refused(path, fields, message):
    with pytest.raises(UsageError) as caught:
        ExportOptions(**fields).for_path(path)
    assert message in caught.value.message


def test_an_option_that_is_off_fits_every_format():
    off = {"fp16": False, "keep_failed": False, "inputs_as_nchw": None, "serving_only": False}
    assert ExportOptions(**off).for_path("m.keras").format == "keras"


def test_the_default_opset_rises_where_the_form_needs_it():
    assert ExportOptions().for_path("m.onnx").opset == 18
    assert ExportOptions(groupnorm="native").for_path("m.onnx").opset == 21
    assert ExportOptions(groupnorm="precise").for_path("m.onnx").opset == 18
    resolved = ExportOptions(groupnorm="native").for_path("m.onnx")
    assert resolved.for_path("m.onnx") == resolved


def test_fields_of_an_export_are_told_from_all_others():
    assert split_fields({"opset": 17, "groups": 4, "verify": False}) == (
        {"opset": 17, "verify": False},
        {"groups": 4},
    )
