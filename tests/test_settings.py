"""Where the policy's fields come from, which source wins, and what is said of bad ones."""

import json

import pytest

from layerswap.errors import LoadError, PolicyError
from layerswap.settings import parse_overrides, parse_value, read_policy


def read(folder, config=None, **options):
    return read_policy(options, None if config is None else str(config), folder)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_without_files_the_defaults_and_the_options(tmp_path):
    assert read(tmp_path).groups == "auto"
    assert read(tmp_path, groups=4).groups == 4


def test_layerswap_toml_is_discovered(tmp_path):
    write(tmp_path / "layerswap.toml", 'groups = 8\nweights = "copy"\nexclude = ["head/**"]\n')
    policy = read(tmp_path)
    assert (policy.groups, policy.weights, policy.exclude) == (8, "copy", ("head/**",))


def test_pyproject_toml_is_discovered(tmp_path):
    write(
        tmp_path / "pyproject.toml",
        '[project]\nname = "theirs"\n[tool.other]\ngroups = 3\n[tool.layerswap]\ngroups = 16\n',
    )
    assert read(tmp_path).groups == 16


@pytest.mark.parametrize("text", ["", '[project]\nname = "theirs"\n', "[tool.black]\nx = 1\n"])
def test_a_pyproject_toml_without_our_table_says_nothing(tmp_path, text):
    write(tmp_path / "pyproject.toml", text)
    assert read(tmp_path).model_fields_set == set()


def test_our_own_file_wins_over_the_shared_one_as_a_whole(tmp_path):
    write(tmp_path / "layerswap.toml", "groups = 8\n")
    write(tmp_path / "pyproject.toml", '[tool.layerswap]\ngroups = 16\nweights = "copy"\n')
    policy = read(tmp_path)
    assert (policy.groups, policy.weights) == (8, "match")


def test_only_the_folder_itself_is_searched(tmp_path):
    write(tmp_path / "layerswap.toml", "groups = 8\n")
    (tmp_path / "below").mkdir()
    assert read(tmp_path / "below").groups == "auto"


def test_a_folder_of_that_name_is_no_file(tmp_path):
    (tmp_path / "layerswap.toml").mkdir()
    assert read(tmp_path).groups == "auto"


def test_config_wins_over_the_discovered_file_field_by_field(tmp_path):
    write(tmp_path / "layerswap.toml", 'groups = 8\nweights = "copy"\n')
    config = write(tmp_path / "mine.toml", "groups = 2\nepsilon = 0.5\n")
    policy = read(tmp_path, config)
    assert (policy.groups, policy.weights, policy.epsilon) == (2, "copy", 0.5)


def test_the_command_line_wins_over_both(tmp_path):
    write(tmp_path / "layerswap.toml", 'groups = 8\nweights = "copy"\n')
    config = write(tmp_path / "mine.toml", "groups = 2\nepsilon = 0.5\n")
    policy = read(tmp_path, config, groups=1, epsilon="carry")
    assert (policy.groups, policy.weights, policy.epsilon) == (1, "copy", "carry")


def test_config_may_be_another_pyproject_toml(tmp_path):
    (tmp_path / "there").mkdir()
    config = write(tmp_path / "there" / "pyproject.toml", "[tool.layerswap]\ngroups = 2\n")
    assert read(tmp_path, config).groups == 2


def test_config_of_any_other_name_has_the_fields_at_its_top(tmp_path):
    config = write(tmp_path / "mine.toml", "[tool.layerswap]\ngroups = 2\n")
    with pytest.raises(PolicyError, match="unknown field 'tool'"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("discovered", "config", "options", "expected"),
    [
        ("groups = 8", "", {"channels_per_group": 2}, ("auto", 2)),
        ("channels_per_group = 8", "", {"groups": 2}, (2, None)),
        ("groups = 8", "channels_per_group = 4", {}, ("auto", 4)),
        ("groups = 8", "channels_per_group = 4", {"groups": 2}, (2, None)),
        ("channels_per_group = 8", "groups = 4", {}, (4, None)),
        ("channels_per_group = 8", "epsilon = 0.1", {}, ("auto", 8)),
    ],
)
def test_the_higher_layer_decides_how_groups_are_sized(
    tmp_path, discovered, config, options, expected
):
    write(tmp_path / "layerswap.toml", discovered)
    policy = read(tmp_path, write(tmp_path / "mine.toml", config), **options)
    assert (policy.groups, policy.channels_per_group) == expected


def test_both_sizes_in_one_layer_contradict_each_other(tmp_path):
    config = write(tmp_path / "mine.toml", "groups = 2\nchannels_per_group = 2\n")
    with pytest.raises(PolicyError, match="exclude each other") as caught:
        read(tmp_path, config)
    assert caught.value.where == str(config)
    with pytest.raises(PolicyError, match="exclude each other"):
        read(tmp_path, groups=2, channels_per_group=2)


def test_overrides_are_tables_in_their_order(tmp_path):
    config = write(
        tmp_path / "mine.toml",
        '[overrides."block1/**"]\ngroups = 8\n[overrides."**"]\nweights = "copy"\n'
        '[overrides."bns[0]"]\ngamma_constraint = "none"\n',
    )
    overrides = read(tmp_path, config).overrides
    assert list(overrides) == ["block1/**", "**", "bns[0]"]
    assert overrides["block1/**"].groups == 8
    assert overrides["**"].weights == "copy"
    assert overrides["bns[0]"].gamma_constraint == "none"


def test_a_config_dictionary_for_a_part(tmp_path):
    config = write(
        tmp_path / "mine.toml", '[gamma_regularizer]\nclass_name = "L2"\nconfig = {l2 = 0.5}\n'
    )
    assert read(tmp_path, config).gamma_regularizer == {"class_name": "L2", "config": {"l2": 0.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gorups = 8", "unknown field 'gorups'; did you mean 'groups'"),
        ("groups = 0", "groups must be a positive integer"),
        ("groups = 3.5", "groups must be a positive integer"),
        ('groups = "8"', "groups must be a positive integer"),
        ("epsilon = -1", "epsilon must be a positive number"),
        ("epsilon = nan", "epsilon must be a positive number"),
        ('[overrides.a]\nexclude = "b"', "unknown field 'overrides.a.exclude'"),
        ("overrides = 3", "overrides"),
        ("self = 1", "unknown field 'self'"),
        ("date = 2024-01-01", "unknown field 'date'"),
    ],
)
@pytest.mark.parametrize("name", ["layerswap.toml", "mine.toml"])
def test_a_bad_field_is_said_with_its_name_and_file(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(PolicyError, match=message) as caught:
        read(tmp_path, path if name == "mine.toml" else None)
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nlayerswap = 3", "[[tool.layerswap]]\nx=1"])
def test_our_place_in_pyproject_toml_taken_by_something_else(tmp_path, text):
    path = write(tmp_path / "pyproject.toml", text)
    with pytest.raises(PolicyError, match="is not a table") as caught:
        read(tmp_path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [b"groups = ", b"groups 8", b"\xff\xfe", b"[a\n", b"a=1\na=2"])
def test_broken_toml_is_said_with_its_file(tmp_path, content):
    path = tmp_path / "layerswap.toml"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="is not valid TOML") as caught:
        read(tmp_path)
    assert caught.value.where == str(path)
    assert caught.value.exit_code == 3


def test_an_unreadable_config_is_said_with_its_file(tmp_path):
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(LoadError, match="can't be read") as caught:
            read(tmp_path, path)
        assert caught.value.where == str(path)


def test_an_empty_config_is_not_silently_none(tmp_path):
    with pytest.raises(LoadError, match="can't be read"):
        read_policy({}, "", tmp_path)


def test_layers_that_contradict_each_other_only_together(tmp_path):
    write(tmp_path / "layerswap.toml", 'weights = "reset"\ncenter = false\n')
    assert read(tmp_path).center is False
    with pytest.raises(PolicyError, match="needs both center and scale"):
        read(tmp_path, weights="match")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-1", -1),
        ("3.5", 3.5),
        ("auto", "auto"),
        ("true", True),
        ('{"class_name": "L2"}', {"class_name": "L2"}),
        ('"quoted"', "quoted"),
        ("", ""),
        ("{broken", "{broken"),
    ],
)
def test_a_value_is_json_where_it_is_json(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_overrides_from_the_command_line():
    pairs = [("b/**", '{"groups": 8}'), ("**", json.dumps({"weights": "copy"}))]
    parsed = parse_overrides(pairs)
    assert list(parsed.items()) == [("b/**", {"groups": 8}), ("**", {"weights": "copy"})]


@pytest.mark.parametrize("text", ["8", "groups=8", "[]", "{", '"x"'])
def test_an_override_that_is_no_object(text):
    with pytest.raises(PolicyError, match=r"overrides: .* is not a JSON object") as caught:
        parse_overrides([("b", text)])
    assert "--overrides" in caught.value.hint
