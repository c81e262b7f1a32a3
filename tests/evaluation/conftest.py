"""The tiny world of tiny_world.py on the disk."""

import pytest

from tests.evaluation import tiny_world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_world")
    tiny_world.write(folder)
    return folder
