import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcclip.segmenter import Computed, Segmentation
from fcclip.segmenter.segments import named_segments
from fcclip.vocabulary import Vocabulary

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


class OneSegment:
    """Stands in for a segmenter: the whole image is the first of the user's class names."""

    def __init__(self, cfg, *, weights=None):
        self.weights = weights

    def __call__(self, image, vocabulary=None, *, min_score=0.0):
        vocabulary = vocabulary or Vocabulary.from_names("default")
        ids = np.ones(image.shape[:2], np.int32)
        record = {"id": 1, "category_id": 0, "isthing": True, "score": 0.9, "area": ids.size}
        segments = named_segments(ids, [record], vocabulary.class_names)
        return Segmentation(image, Computed(vocabulary, ids, segments, segments, ids - 1, np.ones((1, 8))))


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo_script", REPOSITORY / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Segmenter", OneSegment)
    return module


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.webp"):
        Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@contextlib.contextmanager
def without_privileges():
    """As a user who may not write everywhere, even if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def run(demo, *arguments):
    return demo.main([*map(str, arguments)])


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_every_image_gives_a_drawing_of_its_name_a_json_and_a_line(demo, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(demo, "--input", images, "--vocabulary", "red circle; sand:stuff", "--output", out) == 0
    assert names(out) == ["a.jpg", "a.json", "b.json", "b.png", "c.json", "c.webp"]
    content = json.loads((out / "a.json").read_text(encoding="utf-8"))
    assert content["file_name"] == str(images / "a.jpg")
    assert [segment["name"] for segment in content["segments"]] == ["red circle"]
    assert content["class_names"] == ["red circle", "sand"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{images / 'a.jpg'} -> {out / 'a.jpg'}: 1 segments, ")


def test_files_folders_and_globs_may_be_mixed_and_an_image_is_done_once(demo, images):
    paths = demo.find_images([str(images / "b.png"), str(images), str(images / "*.jpg")])
    assert [path.name for path in paths] == ["b.png", "a.jpg", "c.webp"]


def test_hidden_files_of_a_folder_are_skipped(demo, images):
    (images / "._shapes.jpg").write_bytes(b"notes of another system")
    assert [path.name for path in demo.find_images([str(images)]) if path.name.startswith(".")] == []


def test_one_image_may_be_written_to_a_file(demo, images, tmp_path):
    target = tmp_path / "new" / "drawn.png"
    assert run(demo, "--input", images / "a.jpg", "--vocabulary", "cat", "--output", target) == 0
    assert names(target.parent) == ["drawn.json", "drawn.png"]


def test_without_a_vocabulary_the_config_names_the_classes(demo, images, tmp_path):
    run(demo, "--input", images / "a.jpg", "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "a.json").read_text(encoding="utf-8"))["class_names"] == ["default"]


def test_an_unreadable_image_is_reported_and_the_others_are_done(demo, images, tmp_path, capsys):
    (images / "b.png").write_bytes(b"")
    assert run(demo, "--input", images, "--vocabulary", "cat", "--output", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["a.jpg", "a.json", "c.json", "c.webp"]
    errors = capsys.readouterr().err
    assert "b.png" in errors
    assert "1 of 3 images could not be read" in errors


@pytest.mark.parametrize("given", ["none.jpg", "*.tiff"])
def test_an_input_that_matches_nothing_is_named(demo, images, given):
    with pytest.raises(FileNotFoundError, match="does not exist, and as a glob it matches nothing"):
        demo.find_images([str(images / given)])


def test_a_folder_without_images_is_named(demo, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image"):
        demo.find_images([str(tmp_path)])


def test_two_images_with_the_same_stem_are_refused(demo, tmp_path):
    with pytest.raises(ValueError, match=r"would both write 'a\.json'"):
        demo.plan_outputs([Path("x/a.jpg"), Path("y/a.png")], tmp_path)


def test_a_drawing_never_overwrites_its_image(demo, images):
    with pytest.raises(ValueError, match="would overwrite it"):
        demo.plan_outputs([images / "a.jpg"], images)


def test_several_images_need_a_folder(demo, tmp_path):
    with pytest.raises(ValueError, match="is one file, but there are 2 images"):
        demo.plan_outputs([Path("a.jpg"), Path("b.jpg")], tmp_path / "out.png")


def test_an_output_folder_that_cannot_be_written_to_is_named_before_the_model_is_built(
    demo, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "Segmenter", lambda *_, **__: pytest.fail("built"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    drawings = demo.plan_outputs([images / "a.jpg"], locked)
    with without_privileges(), pytest.raises(PermissionError, match=r"cannot write to the output folder .*locked"):
        demo.check_writable(drawings[0].parent)


def test_a_missing_config_is_an_error_in_one_line(images, tmp_path):
    command = [sys.executable, REPOSITORY / "demo" / "demo.py", "--config-file", "none.yaml", "--output", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # also without an installed package
    done = subprocess.run([*command, "--input", images], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: config file 'none.yaml' not found")
    assert "Traceback" not in done.stderr
