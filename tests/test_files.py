import errno
import os

import pytest

from int8kit import files
from int8kit.errors import FileError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def broken():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed in the middle")

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "far").mkdir()
    real, link, dangling = tmp_path / "far" / "real.json", tmp_path / "link.json", tmp_path / "dangling.json"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to("far/real.json")
    dangling.symlink_to("far/none.json")
    for path in (link, dangling):
        files.check_target(path, ours=lambda _: True, force=False)
        files.write_text(path, "new")
        assert path.is_symlink()
        assert path.read_text() == "new"
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "dangling.json", "far", "link.json", "none.json", "real.json",
    ]  # fmt: skip


def test_a_read_only_file_is_left_alone(tmp_path):
    """The folder would allow a replacement, and root may write anything."""
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(FileError, match=r"it is read-only; .*chmod"):
        files.check_target(path, ours=lambda _: True, force=True)
    with pytest.raises(FileError, match="it is read-only"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_ordinary_permissions(tmp_path):
    files.write_text(tmp_path / "a.json", "{}")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no file"),
        ("{", "damaged JSON.*line 1"),
        ("[]", "has the format None"),
        ('{"format": "other/2"}', "has the format 'other/2'; expected 'ours/1'"),
        (b"\xff\xfe", "cannot read"),
        ("[" * 100_000, "damaged JSON"),
        ('{"a": ' + "1" * 5000 + "}", "damaged JSON"),
        ('{"format": "ours/1", "a": 1, "a": 1}', "duplicate key 'a'"),
        ('{"format": "ours/1", "a": [{"b": 1, "c": {"d": 1, "e": 2, "d": 3}}]}', "duplicate key 'd'"),
        ('{"format": "other/1", "format": "ours/1"}', "duplicate key 'format'"),
        ('{"format": "ours/1", "a": NaN}', "the number NaN is not finite"),
        ('{"format": "ours/1", "a": [-Infinity]}', "the number -Infinity is not finite"),
        ('{"format": "ours/1", "a": 1e999}', "the number 1e999 is not finite"),
        ("\ufeff{}", "damaged JSON.*BOM"),
    ],
)
def test_reading_says_what_is_wrong(tmp_path, text, reason):
    path = tmp_path / "a.json"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(FileError, match=reason + ".*; make it so"):
        files.read_json(path, "ours/1", remedy="make it so")


def test_target_is_checked_before_the_work(tmp_path):
    theirs = tmp_path / "theirs.json"
    theirs.write_text("precious")

    def ours(path):
        return files.is_ours(path, "ours/1")

    with pytest.raises(FileError, match=r"was not written by int8kit.*--force"):
        files.check_target(theirs, ours=ours, force=False)
    files.check_target(theirs, ours=ours, force=True)
    with pytest.raises(FileError, match="it is a folder"):
        files.check_target(tmp_path, ours=ours, force=False)
    with pytest.raises(FileError, match="cannot write"):
        files.check_target(theirs / "below" / "a.json", ours=ours, force=False)
    with pytest.raises(FileError, match=r"theirs\.json' is not a folder"):
        files.check_target(theirs / "below" / "deep" / "a.json", ours=ours, force=False)
    with pytest.raises(FileError, match=r"was not written by int8kit"):
        files.check_target(theirs, ours=lambda path: bool(b"\xff".decode()), force=False)
    assert theirs.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [theirs]


def test_rows_stand_on_lines_of_their_own():
    text = files.dump_rows({"format": "x", "rows": [{"a": 1}, {"a": 2}]}, "rows")
    assert text == '{\n  "format": "x",\n  "rows": [\n    {"a": 1},\n    {"a": 2}\n  ]\n}\n'


def test_a_fifo_a_device_and_a_folder_are_no_files(tmp_path):
    """A FIFO would block for ever, and a device has nothing to replace."""
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "FIFO"), (tmp_path, "folder"), (files.Path("/dev/null"), "device")):
        with pytest.raises(FileError, match=f"cannot read .*it is a {kind}; make it so"):
            files.read_json(path, "ours/1", remedy="make it so")
        with pytest.raises(FileError, match=f"cannot write .*it is a {kind}; name a file"):
            files.check_target(path, ours=lambda _: True, force=True)
    with pytest.raises(FileError, match=r"it is a folder"):
        files.check_target(files.Path(""), ours=lambda _: True, force=True)


def test_a_loop_of_links_is_left_alone(tmp_path):
    """A replacement would end the loop, and the reason would be lost."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(FileError, match=r"cannot read .*loop of symbolic links"):
        files.read_json(one, "ours/1", remedy="")
    for write in (
        lambda: files.check_target(one, ours=lambda _: True, force=True),
        lambda: files.write_text(one, "new"),
    ):
        with pytest.raises(FileError, match=r"cannot write .*it is a loop of symbolic links; name a file"):
            write()
    assert one.is_symlink()
    assert two.is_symlink()


@pytest.mark.skipif(not files.Path("/proc").is_dir(), reason="Linux")
def test_a_folder_that_takes_no_new_file():
    with pytest.raises(FileError, match=r"cannot write .*'/proc' takes no new file"):
        files.check_target(files.Path("/proc/a.json"), ours=lambda _: True, force=False)


@pytest.mark.parametrize("name", ["\0.json", "x" * 300 + ".json"])
def test_an_impossible_name_is_one_error(tmp_path, name):
    with pytest.raises(FileError, match="cannot write"):
        files.check_target(tmp_path / name, ours=lambda _: True, force=False)
    with pytest.raises(FileError, match="cannot read"):
        files.read_json(tmp_path / name, "ours/1", remedy="")


def test_a_full_disk_is_no_mistake_of_the_call(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Path, "write_text", full)
    with pytest.raises(FileError, match=r"cannot write .*No space left on device\); free some space") as caught:
        files.write_text(tmp_path / "a.json", "text")
    assert caught.value.exit_status == 1
    assert list(tmp_path.iterdir()) == []
