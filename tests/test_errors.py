import os
import subprocess
import sys

import pytest

from fcclip.errors import InputError, MissingFileError, NotInstalledError, is_users, run_program


def test_errors_of_the_user_are_also_pythons_own_kind():
    assert issubclass(InputError, ValueError) and issubclass(MissingFileError, FileNotFoundError)
    assert issubclass(NotInstalledError, ImportError)


@pytest.mark.parametrize(
    ("error", "users"),
    [(InputError("x"), True), (PermissionError("x"), True), (ValueError("x"), False), (KeyError("x"), False)],
)
def test_the_class_alone_says_whose_an_error_is(error, users):
    assert is_users(error) is users


def test_a_program_says_an_error_of_the_user_in_one_line(capsys):
    def main():
        raise MissingFileError("'a.pth' does not exist")

    assert run_program(main) == 1
    assert capsys.readouterr().err == "error: 'a.pth' does not exist\n"


def test_letters_that_a_pipe_cannot_show_are_replaced():
    code = "from fcclip.errors import run_program; run_program(lambda: print('Straße 写真'))"
    options = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "capture_output": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **options).stdout == b"Stra?e ??\n"


def test_a_program_hands_on_our_own_mistakes():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (2, 2)])
def test_the_exit_code_is_what_main_returns(returned, code):
    assert run_program(lambda: returned) == code
