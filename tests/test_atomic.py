"""Nothing half-written, nothing lost, whatever goes wrong."""

import errno
import os
import shutil
import stat

import pytest

from layerswap import atomic
from layerswap.atomic import check_target, replacing
from layerswap.errors import ExportError, UsageError


def contents(folder):
    """Every file below the folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def saved_model(tmp_path):
    folder = tmp_path / "model"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"old")
    (folder / "variables" / "data").write_bytes(b"old data")
    return folder


def write_folder(path, content=b"new"):
    path.mkdir()
    (path / "saved_model.pb").write_bytes(content)


def write(target, *actions, **options):
    """Replaces the target by what the actions do, one after the other, to the temporary."""
    with replacing(target, **options) as temporary:
        for action in actions:
            action(temporary)


def raising(error):
    """An action that fails."""

    def action(_):
        raise error

    return action


def test_the_temporary_is_hidden_beside_the_target_and_keeps_its_suffix(tmp_path):
    with replacing(tmp_path / "model.keras") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".keras"
        temporary.write_bytes(b"new")
        assert not (tmp_path / "model.keras").exists()
    assert contents(tmp_path) == {"model.keras": b"new"}


def test_a_long_name_is_no_problem(tmp_path):
    name = "m" * 250 + ".onnx"
    with replacing(tmp_path / name) as temporary:
        temporary.write_bytes(b"new")
    assert contents(tmp_path) == {name: b"new"}


def test_overwrites_twice(tmp_path):
    for content in (b"one", b"two", b"three"):
        with replacing(tmp_path / "a.h5", overwrite=True) as temporary:
            temporary.write_bytes(content)
        assert contents(tmp_path) == {"a.h5": content}


def test_overwrites_a_folder_twice(saved_model):
    for content in (b"two", b"three"):
        with replacing(saved_model, overwrite=True, folder=True) as temporary:
            write_folder(temporary, content)
        assert contents(saved_model.parent) == {"model/saved_model.pb": content}


def test_an_existing_target_needs_permission(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"old")
    with pytest.raises(UsageError, match=r"--force.*overwrite=True"), replacing(tmp_path / "a.h5"):
        pytest.fail("must be refused before the work")
    assert contents(tmp_path) == {"a.h5": b"old"}


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    def someone_else(_):
        (tmp_path / "a.h5").write_bytes(b"theirs")

    with pytest.raises(UsageError):
        write(tmp_path / "a.h5", lambda path: path.write_bytes(b"new"), someone_else)
    assert contents(tmp_path) == {"a.h5": b"theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_saved_model_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_bytes(b"years")
    for folder in (False, True):
        with pytest.raises(UsageError, match="folder"):
            check_target(tmp_path / "precious", overwrite, folder=folder)


def test_a_saved_model_is_not_replaced_by_a_file_nor_a_file_by_one(saved_model):
    with pytest.raises(UsageError, match="a file can't replace it"):
        check_target(saved_model, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_target(saved_model / "saved_model.pb", overwrite=True, folder=True)


def test_a_device_is_never_replaced():
    with pytest.raises(UsageError, match="not a regular file"):
        check_target("/dev/null", overwrite=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_missing_parent_folder(tmp_path):
    with pytest.raises(ExportError, match=r"does not exist"):
        check_target(tmp_path / "absent" / "a.h5")
    assert contents(tmp_path) == {}


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError):
        check_target(tmp_path / "file" / "a.h5")


def test_a_name_too_long_for_the_file_system(tmp_path):
    with pytest.raises(ExportError):
        check_target(tmp_path / ("m" * 300))


def test_a_read_only_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="can't be written to"):
        check_target(tmp_path / "a.h5")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_an_operating_system_error_leaves_the_old_file(tmp_path, code):
    (tmp_path / "a.h5").write_bytes(b"old")
    fail = raising(OSError(code, os.strerror(code)))
    with pytest.raises(ExportError, match=os.strerror(code)):
        write(tmp_path / "a.h5", lambda path: path.write_bytes(b"half"), fail, overwrite=True)
    assert contents(tmp_path) == {"a.h5": b"old"}


def test_a_disk_that_turns_out_full_at_the_end(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "a.h5").write_bytes(b"old")
    with pytest.raises(ExportError, match="No space left"):
        write(tmp_path / "a.h5", lambda path: path.write_bytes(b"new"), overwrite=True)
    assert contents(tmp_path) == {"a.h5": b"old"}


def test_a_full_device(tmp_path):
    """The real thing: the temporary is a link to the device that is always full."""
    with pytest.raises(ExportError, match="No space left"):
        write(
            tmp_path / "a.h5",
            lambda path: path.symlink_to("/dev/full"),
            lambda path: path.write_bytes(b"new"),
        )
    assert list(tmp_path.iterdir()) == []
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_any_other_exception_passes_through_and_leaves_the_old_file(saved_model, error):
    before = contents(saved_model.parent)
    with pytest.raises(error):
        write(saved_model, write_folder, raising(error), overwrite=True, folder=True)
    assert contents(saved_model.parent) == before
    assert [path.name for path in saved_model.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_old_folder_comes_back_when_the_second_rename_fails(saved_model, monkeypatch, error):
    before, rename = contents(saved_model.parent), os.replace
    calls = []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(ExportError if error is OSError else error):
        write(saved_model, write_folder, overwrite=True, folder=True)
    assert contents(saved_model.parent) == before
    assert [path.name for path in saved_model.parent.iterdir()] == ["model"]


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(ExportError), replacing(tmp_path / "a.h5"):
        pass
    assert contents(tmp_path) == {}


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.h5").write_bytes(b"old")
    (tmp_path / "link.h5").symlink_to(tmp_path / "real" / "a.h5")
    with replacing(tmp_path / "link.h5", overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link.h5").is_symlink()
    assert contents(tmp_path / "real") == {"a.h5": b"new"}


def test_the_permissions_stay(tmp_path):
    target = tmp_path / "a.h5"
    target.write_bytes(b"old")
    target.chmod(0o640)
    with replacing(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_is_saved_model(saved_model, tmp_path):
    assert atomic.is_saved_model(saved_model)
    shutil.rmtree(saved_model)
    assert not atomic.is_saved_model(tmp_path)


def stage(folder, names=("m.onnx.ref.npz", "m.onnx")):
    """Files staged in a hidden folder, with their places in the folder above."""
    hidden = folder / ".hidden"
    hidden.mkdir()
    for name in names:
        (hidden / name).write_bytes(b"new")
    return [(hidden / name, folder / name) for name in names]


@pytest.mark.parametrize(
    "old", [{}, {"m.onnx": b"old"}, {"m.onnx": b"old", "m.onnx.ref.npz": b"x"}]
)
def test_publish_moves_all_files(tmp_path, old):
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    atomic.publish(stage(tmp_path))
    shutil.rmtree(tmp_path / ".hidden")
    assert contents(tmp_path) == {"m.onnx": b"new", "m.onnx.ref.npz": b"new"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fatal", range(4))
@pytest.mark.parametrize(
    "old", [{}, {"m.onnx": b"old"}, {"m.onnx": b"old", "m.onnx.ref.npz": b"x"}]
)
def test_publish_moves_all_files_or_none(tmp_path, monkeypatch, old, fatal, after, error):
    """Whichever rename fails, and be it that the interrupt comes just after it."""
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    moves, rename, calls = stage(tmp_path), os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) - 1 != fatal or after:
            rename(source, target)
        if len(calls) - 1 == fatal:
            raise error

    monkeypatch.setattr(os, "replace", replace)
    if fatal < 2 + len(old):
        with pytest.raises(type(error)):
            atomic.publish(moves)
        expected = old
    else:
        atomic.publish(moves)
        expected = {"m.onnx": b"new", "m.onnx.ref.npz": b"new"}
    shutil.rmtree(tmp_path / ".hidden")
    assert contents(tmp_path) == expected


def test_publish_flushes_everything_before_it_moves_anything(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "m.onnx").write_bytes(b"old")
    moves = stage(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.publish(moves)
    shutil.rmtree(tmp_path / ".hidden")
    assert contents(tmp_path) == {"m.onnx": b"old"}


def test_an_error_about_a_staged_file_names_its_place(tmp_path):
    with pytest.raises(ExportError) as caught, atomic.staging(tmp_path / "m.onnx") as folder:
        write(folder / "m.onnx", raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert caught.value.where == str(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
