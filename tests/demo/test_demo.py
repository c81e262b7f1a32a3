import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from fcclip import Segmenter
from fcclip.data import read_image
from fcclip.errors import UserError
from fcclip.segmenter import Computed, Segmentation, VideoFile, VideoWriter
from fcclip.segmenter.segments import named_segments
from fcclip.vocabulary import Vocabulary

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534


class OneSegment:
    """Stands in for a segmenter: the whole image is the first of the user's class names."""

    video = Segmenter.video
    calls: ClassVar = []

    def __init__(self, cfg, *, weights=None, device=None):
        self.calls.clear()
        self.calls.append(device)

    def __call__(self, images, vocabulary=None, **options):
        self.calls.append((len(images), options))
        return [self.segment(image, vocabulary or Vocabulary.from_names("default")) for image in images]

    def segment(self, image, vocabulary):
        ids = np.ones(image.shape[:2], np.int32)
        record = {"id": 1, "category_id": 0, "isthing": True, "score": 0.9, "area": ids.size}
        segments = named_segments(ids, [record], vocabulary.class_names)
        return Segmentation(image, Computed(vocabulary, ids, segments, segments, ids - 1, np.ones((1, 8))))


def load_demo():
    spec = importlib.util.spec_from_file_location("demo_script", REPOSITORY / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def demo(monkeypatch):
    module = load_demo()
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
    paths = demo.find_files([str(images / "b.png"), str(images), str(images / "*.jpg")])
    assert [path.name for path in paths] == ["b.png", "a.jpg", "c.webp"]


def test_hidden_files_of_a_folder_are_skipped(demo, images):
    (images / "._shapes.jpg").write_bytes(b"notes of another system")
    assert [path.name for path in demo.find_files([str(images)]) if path.name.startswith(".")] == []


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
    assert "1 of 3 inputs could not be read" in errors


@pytest.mark.parametrize("given", ["none.jpg", "*.tiff"])
def test_an_input_that_matches_nothing_is_named(demo, images, given):
    with pytest.raises(FileNotFoundError, match="does not exist, and as a glob it matches nothing"):
        demo.find_files([str(images / given)])


def test_a_folder_without_images_is_named(demo, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image or video"):
        demo.find_files([str(tmp_path)])


def test_two_images_with_the_same_stem_are_refused(demo, tmp_path):
    with pytest.raises(ValueError, match=r"would both write 'a\.json'"):
        demo.plan_outputs([Path("x/a.jpg"), Path("y/a.png")], tmp_path)


def test_a_drawing_never_overwrites_its_image(demo, images):
    with pytest.raises(ValueError, match=r"would overwrite .*a\.jpg"):
        demo.plan_outputs([images / "a.jpg"], images)


def test_several_images_need_a_folder(demo, tmp_path):
    with pytest.raises(ValueError, match="is one file, but there are 2 inputs"):
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


def test_images_are_seen_in_batches_and_options_are_passed_on(demo, images, tmp_path):
    arguments = ("--batch-size", 2, "--device", "cpu", "--confidence-threshold", 0.3, "--unknown", "cat; dog")
    run(demo, "--input", images, "--output", tmp_path / "out", *arguments)
    device, *calls = OneSegment.calls
    assert device == "cpu"
    assert calls == [
        (number, {"min_score": 0.3, "unknown": "cat; dog", "others": False, "batch_size": 2}) for number in (2, 1)
    ]
    run(demo, "--input", images, "--output", tmp_path / "out", "--unknown")
    assert OneSegment.calls[1][1]["unknown"] is True


def test_every_task_gives_a_drawing(demo, images, tmp_path):
    out = tmp_path / "out"
    run(demo, "--input", images / "a.jpg", "--output", out, "--tasks", "semantic", "instances", "panoptic")
    assert names(out) == ["a.jpg", "a.json", "a_instances.jpg", "a_panoptic.jpg"]


def test_without_output_or_window_nothing_is_begun(demo, images, capsys):
    with pytest.raises(SystemExit):
        run(demo, "--input", images)
    assert "say where drawings go: --output PATH, or --show" in capsys.readouterr().err


def test_a_window_that_cannot_be_opened_is_said(demo, images, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(ValueError, match="no window can be opened: there is no display, or this OpenCV"):
        run(demo, "--input", images, "--show")


def test_a_window_shows_every_image_until_it_is_closed(demo, images, monkeypatch):
    shown, keys = [], iter([ord("n"), 27])
    monkeypatch.setattr(demo, "open_window", lambda: None)
    monkeypatch.setattr(demo.cv2, "imshow", lambda _, drawing: shown.append(drawing.shape))
    monkeypatch.setattr(demo.cv2, "waitKey", lambda _: next(keys))
    with pytest.raises(KeyboardInterrupt):
        run(demo, "--input", images, "--show")
    assert len(shown) == 2


# ---- videos ----

needs_video = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV (extra video)")


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_video(path, num_frames=4):
    with VideoWriter(path, rate=10) as video:
        for index in range(num_frames):
            video.write(np.full((20, 30, 3), 40 * index % 256, np.uint8), index / 10)
    return path


@needs_video
def test_a_video_gives_a_video_and_a_line_a_frame(demo, images, tmp_path, capsys):
    write_video(images / "clip.mkv")
    out = tmp_path / "out"
    assert run(demo, "--input", images, "--output", out, "--tasks", "panoptic", "semantic") == 0
    expected = ["clip.jsonl", "clip.mp4", "clip_semantic.mp4"]
    assert [name for name in names(out) if name.startswith("clip")] == expected
    assert [round(frame.seconds, 3) for frame in VideoFile(out / "clip.mp4")] == [0, 0.1, 0.2, 0.3]
    lines = lines_of(out / "clip.jsonl")
    assert [line["frame"] for line in lines] == [0, 1, 2, 3]
    assert {segment["id"] for line in lines for segment in line["segments"]} == {1}
    assert f"{images / 'clip.mkv'} -> {out / 'clip.mp4'}: 4 frames, " in capsys.readouterr().out


@needs_video
def test_the_published_flag_takes_a_video_of_any_name_and_one_file_for_output(demo, tmp_path):
    clip = write_video(tmp_path / "clip.mp4").rename(tmp_path / "clip.dat")
    assert run(demo, "--video-input", clip, "--output", tmp_path / "out" / "drawn.webm") == 0
    assert names(tmp_path / "out") == ["drawn.jsonl", "drawn.webm"]
    with pytest.raises(ValueError, match=r"out\.png' does not end like a video, which '.*clip\.dat' is"):
        run(demo, "--video-input", clip, "--output", tmp_path / "out.png")


@needs_video
def test_an_unreadable_video_is_reported_and_the_others_are_done(demo, tmp_path, capsys):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert run(demo, "--input", tmp_path / "*.mp4", "--output", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["a.jsonl", "a.mp4"]
    errors = capsys.readouterr().err
    assert "b.mp4' cannot be read as a video" in errors
    assert "1 of 2 inputs could not be read" in errors


@needs_video
def test_of_a_video_that_is_cut_off_the_missing_frames_are_said(demo, tmp_path, capsys):
    path = write_video(tmp_path / "a.mp4", num_frames=40)
    path.write_bytes(path.read_bytes()[:-200])
    assert run(demo, "--input", path, "--output", tmp_path / "out") == 0
    missing = 40 - len(list(VideoFile(path)))
    assert missing > 0
    assert f"a.mp4: {missing} frames could not be read and are left out" in capsys.readouterr().err


@needs_video
def test_a_video_without_a_readable_frame_is_reported(demo, tmp_path, capsys):
    content = write_video(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: content.index(b"mdat") + 20])
    assert run(demo, "--input", tmp_path / "a.mp4", "--output", tmp_path / "out") == 1
    assert names(tmp_path / "out") == []
    assert "a.mp4' has no frame that can be read" in capsys.readouterr().err


@needs_video
def test_an_interrupted_video_is_whole_up_to_there(demo, tmp_path, monkeypatch):
    def stop(segmenter, image, vocabulary):
        if image.mean() > 60:
            raise KeyboardInterrupt
        return segment(segmenter, image, vocabulary)

    segment = OneSegment.segment
    monkeypatch.setattr(OneSegment, "segment", stop)
    with pytest.raises(KeyboardInterrupt):
        run(demo, "--input", write_video(tmp_path / "a.mp4"), "--output", tmp_path / "out")
    assert len(list(VideoFile(tmp_path / "out" / "a.mp4"))) == len(lines_of(tmp_path / "out" / "a.jsonl")) == 2


@needs_video
def test_a_webcam_is_a_video_until_it_is_stopped(demo, tmp_path, monkeypatch):
    class ThreeFrames:
        num_frames, num_unreadable, rate = 0, 0, 30

        def __init__(self, index):
            assert index == 0

        def __iter__(self):
            for index in range(3):
                yield SimpleNamespace(image=np.zeros((20, 30, 3), np.uint8), seconds=index / 7)
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "Camera", ThreeFrames)
    with pytest.raises(KeyboardInterrupt):
        run(demo, "--webcam", "--output", tmp_path / "out")
    assert len(list(VideoFile(tmp_path / "out" / "webcam_0.mp4"))) == 3


def test_no_camera_is_said_before_the_model_is_built(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "Segmenter", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match="there is no camera 99"):
        run(demo, "--webcam", 99, "--output", tmp_path / "out")


@needs_video
def test_forty_frames_of_the_shapes_world_come_out_as_forty_with_lasting_identities(tmp_path):
    image = read_image(REPOSITORY / "demo" / "images" / "shapes_1.jpg")
    with VideoWriter(tmp_path / "shapes.mp4", rate=20) as video:
        for index in range(40):
            video.write(image[index : index + 200, index // 2 : index // 2 + 200], index / 20)
    script = load_demo()
    options = ("--config-file", "configs/shapes/fcclip_shapes.yaml", "--weights", "shapes_fcclip.safetensors")
    assert run(script, "--video-input", tmp_path / "shapes.mp4", "--output", tmp_path / "out", *options) == 0
    assert len(list(VideoFile(tmp_path / "out" / "shapes.mp4"))) == 40
    lines = lines_of(tmp_path / "out" / "shapes.jsonl")
    seen = [{segment["id"] for segment in line["segments"] if segment["isthing"]} for line in lines]
    lasting = set.intersection(*seen[:30])
    assert len(lasting) >= 2
    assert len(set.union(*seen)) <= len(lasting) + 4


def test_a_missing_config_is_an_error_in_one_line(images, tmp_path):
    command = [sys.executable, REPOSITORY / "demo" / "demo.py", "--config-file", "none.yaml", "--output", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # also without an installed package
    done = subprocess.run([*command, "--input", images], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("error: config file 'none.yaml' not found")
    assert "Traceback" not in done.stderr


def test_an_exported_folder_takes_the_place_of_the_model(demo, images, tmp_path, monkeypatch):
    given = []

    class Exported(OneSegment):
        def __init__(self, folder, *, providers):
            given.append((folder, providers))

    monkeypatch.setattr(demo, "ExportedSegmenter", Exported)
    folder = ["--runtime", "onnx", "--weights", "exported"]
    assert run(demo, "--input", images / "a.jpg", *folder, "--output", tmp_path / "out") == 0
    assert names(tmp_path / "out") == ["a.jpg", "a.json"] and given == [("exported", ["CPUExecutionProvider"])]
    assert OneSegment.calls[-1] == (1, {"min_score": 0.5, "batch_size": 1})


@pytest.mark.parametrize(
    "more, message",
    [
        (["--weights", "nowhere"], r"nowhere/image\.onnx' does not exist .*tools/export\.py writes it"),
        ([], "needs --weights FOLDER"),
        (["--weights", "x", "--unknown", "--opts", "SEED", "1"], "has no --unknown, --opts, which need the model"),
        (["--weights", "x", "--device", "mps"], "unknown device of onnxruntime 'mps'"),
    ],
)
def test_what_an_exported_folder_cannot_do_is_said(images, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        load_demo().main(
            ["--input", str(images / "a.jpg"), "--output", str(tmp_path / "out"), "--runtime", "onnx", *more]
        )
