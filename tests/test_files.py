import doctest
import math

import pytest

import fcclip.files
from fcclip.errors import InputError, MissingFileError
from fcclip.files import listed, read_json, write_atomically, write_json


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(fcclip.files).failed == 0


def test_what_is_written_as_json_is_read_back_with_null_for_undefined_numbers(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, math.nan, {"x": -math.inf}]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None, {"x": None}]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b" \n", b'{"a": 1', b"\xff\xfe"])
def test_a_broken_json_file_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"predictions '.*results\.json'"):
        read_json(path, what="predictions")


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json")


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, lambda file: file.write(b"before"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_list_of_names_is_cut_after_its_limit():
    assert listed([]) == "" and listed(["a", 2]) == "a, 2" and listed(range(5), limit=1) == "0 and 4 more"
