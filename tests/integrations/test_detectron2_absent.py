"""What a user is told where detectron2 is not installed."""

import sys

import pytest


@pytest.fixture
def forgotten(monkeypatch):
    """The integration as if it had never been imported."""
    for name in [name for name in sys.modules if name.startswith("fcclip.integrations.detectron2")]:
        monkeypatch.delitem(sys.modules, name)


def test_without_detectron2_the_error_says_how_to_get_it(forgotten, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)  # an import of it fails from here on
    with pytest.raises(ImportError) as caught:
        import fcclip.integrations.detectron2  # noqa: F401
    message = str(caught.value)
    assert "fcclip[detectron2]" in message and "facebookresearch/detectron2.git" in message and "PYTHONPATH" in message


def test_something_missing_inside_detectron2_is_named_as_it_is(forgotten, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import a_dependency_of_detectron2")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_dependency_of_detectron2"):
        import fcclip.integrations.detectron2  # noqa: F401
