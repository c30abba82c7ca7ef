import pytest

from int8kit import files
from int8kit.spec import FileError


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
        ('{"format": "other/2"}', "has the format 'other/2'; legal is 'ours/1'"),
        (b"\xff\xfe", "cannot read"),
        ("[" * 100_000, "damaged JSON"),
        ('{"a": ' + "1" * 5000 + "}", "damaged JSON"),
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
    assert theirs.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [theirs]


def test_rows_stand_on_lines_of_their_own():
    text = files.dump_rows({"format": "x", "rows": [{"a": 1}, {"a": 2}]}, "rows")
    assert text == '{\n  "format": "x",\n  "rows": [\n    {"a": 1},\n    {"a": 2}\n  ]\n}\n'
