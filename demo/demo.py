"""Segments images and videos with the class names you give.

    python demo/demo.py --config-file configs/shapes/fcclip_shapes.yaml --weights shapes_fcclip.safetensors \\
        --input photo.jpg clip.mp4 folder/ --vocabulary "red circle; blue star, azure star; sand:stuff" --output out/

For every image `out/` receives the drawing under the image's own name and a JSON file with its segments; for every
video a video (H.264, else VP9) in which things keep their number and colour, and a .jsonl file with a line a frame.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import glob
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fcclip import Segmenter
from fcclip.config import load_config, lookup
from fcclip.data import read_image
from fcclip.errors import InputError, MissingFileError, run_program
from fcclip.segmenter import (
    VIDEO_SUFFIXES,
    Camera,
    ExportedSegmenter,
    Segmentation,
    VideoFile,
    VideoWriter,
    read_vocabulary,
)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TASKS = ("panoptic", "instances", "semantic")
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}  # by --device
WINDOW, STOP_KEYS = "fcclip", (27, ord("q"))
DEFAULT_CONFIG = "configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default=DEFAULT_CONFIG, metavar="FILE", help="YAML file (default: %(default)s)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="P", help="images, videos, folders of them, quoted globs")
    source.add_argument("--video-input", metavar="FILE", help="a video, whatever its name ends in")
    source.add_argument("--webcam", nargs="?", type=int, const=0, metavar="N", help="camera N (0); Ctrl-C stops")
    add(
        "--vocabulary",
        "--vocab",
        help="the only classes to look for: ';' between classes, ',' between the synonyms of a class, ':stuff' or "
        "':thing' after a class (unmarked: thing); without it the classes of the config's first test set",
    )
    add("--output", metavar="PATH", help="folder, made if needed; or, for one image or video, a file name")
    add("--show", action="store_true", help="show drawings in a window; a key goes on, Esc or q stops")
    add("--weights", metavar="FILE", help="checkpoint (default: MODEL.WEIGHTS of the config)")
    add("--device", help="cpu, cuda, mps or auto (default: MODEL.DEVICE of the config)")
    add(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx: --weights is a folder and --vocabulary a file of tools/export.py, run by onnxruntime",
    )
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="things with a lower score are left out; stuff always stays (default: %(default)s)",
    )
    add(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["panoptic"],
        help="what to draw, the first under the name of the image, the others with the task added (default: panoptic)",
    )
    add("--batch-size", type=int, default=1, metavar="N", help="images seen at once (default: %(default)s)")
    add(
        "--unknown",
        nargs="?",
        const=True,
        default=False,
        metavar="NAMES",
        help="call unknown what fits none of your names, but one of NAMES (by default those of the training)",
    )
    add(
        "--others",
        nargs="?",
        const=True,
        default=False,
        metavar="NAMES",
        help="leave out what NAMES (by default those of the training) fit better than yours",
    )
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, rest of the line")
    args = parser.parse_args(arguments)
    if args.output is None and not args.show:
        parser.error("say where drawings go: --output PATH, or --show for a window")
    if args.batch_size < 1:
        parser.error(f"--batch-size is a number of images, at least 1, not {args.batch_size}")
    return args


def find_files(inputs: Iterable[str]) -> list[Path]:
    """What files, folders and globs stand for: each once, images and videos of a folder or glob sorted by name."""
    unique: dict[Path, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not file.name.startswith(".")
            )
            if not files:
                endings = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
                raise MissingFileError(f"folder '{given}' holds no image or video ({endings})")
        elif path.exists():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
            if not files:
                raise MissingFileError(f"input '{given}' does not exist, and as a glob it matches nothing")
        unique.update(dict.fromkeys(files))
    return list(unique)


def has_video_name(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def plan_outputs(
    files: Sequence[Path], output: Path, *, videos: Collection[Path] = (), tasks: Sequence[str] = TASKS[:1]
) -> list[Path]:
    """Where the drawing of each file goes; `written` says what stands beside it."""
    if output.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not output.is_dir():
        if len(files) > 1:
            raise InputError(f"--output '{output}' is one file, but there are {len(files)} inputs; give a folder")
        if has_video_name(output) != (files[0] in videos):
            kind = "a video" if files[0] in videos else "an image"
            raise InputError(f"--output '{output}' does not end like {kind}, which '{files[0]}' is")
        drawings = [output]
    else:
        if output.exists() and not output.is_dir():
            raise InputError(f"--output '{output}' is an existing file, not a folder")
        drawings = [output / (path.with_suffix(".mp4") if path in videos else path).name for path in files]
    sources = {path.resolve(): path for path in files}
    writers: dict[Path, Path] = {}
    for path, drawing in zip(files, drawings):
        for target in written(drawing, tasks, is_video=path in videos):
            if target.resolve() in sources:
                raise InputError(
                    f"what comes of '{path}' would overwrite '{sources[target.resolve()]}'; choose another --output"
                )
            other = writers.setdefault(target, path)
            if other != path:
                raise InputError(
                    f"'{other}' and '{path}' would both write '{target.name}' in '{target.parent}'; "
                    "run them one after the other with different --output"
                )
    return drawings


def written(drawing: Path, tasks: Sequence[str], *, is_video: bool) -> list[Path]:
    """The files of an image or video: a drawing a task, then the segments."""
    others = [drawing.with_stem(f"{drawing.stem}_{task}") for task in tasks[1:]]
    return [drawing, *others, drawing.with_suffix(".jsonl" if is_video else ".json")]


def check_writable(folder: Path) -> None:
    """Makes the folder and proves that files can be written there, before minutes are spent on a model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"cannot write to the output folder '{folder}': {error.strerror}") from error


def open_window() -> None:
    """Opens the window of `show`, before minutes are spent on a model."""
    is_blind = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    try:
        if not is_blind:  # some OpenCVs end the process there
            cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
            return
    except cv2.error:
        pass
    raise InputError(
        "no window can be opened: there is no display, or this OpenCV was built without windows (install opencv-python "
        "in place of opencv-python-headless); leave --show out and give --output"
    )


def show(drawing: np.ndarray, *, is_frame: bool) -> None:
    """Shows a drawing; an image until a key is pressed. Esc and q stop as Ctrl-C does."""
    cv2.imshow(WINDOW, drawing[..., ::-1])
    if cv2.waitKey(1 if is_frame else 0) & 0xFF in STOP_KEYS:
        raise KeyboardInterrupt


class Demo:
    """Does one image or video after the other.

    Args:
        segmenter: finds the segments.
        args: of the command line.
        options: of every call of the segmenter.
        bar: shows how far it is.
    """

    def __init__(
        self,
        segmenter: Segmenter | ExportedSegmenter,
        args: argparse.Namespace,
        options: Mapping[str, Any],
        bar: Progress,
    ) -> None:
        self.segmenter, self.args, self.options, self.bar = segmenter, args, options, bar

    def images(self, images: Mapping[Path, Path | None]) -> int:
        """Does images, of which the values are the drawings; returns how many could not be read."""
        unreadable, paths, step = 0, list(images), self.args.batch_size
        task = self.bar.add_task("images", total=len(paths))
        for start in range(0, len(paths), step):
            begin, pixels = time.perf_counter(), {}
            for path in paths[start : start + step]:
                try:
                    pixels[path] = read_image(path)
                except InputError as error:
                    print(f"error: {error}", file=sys.stderr)
                    unreadable += 1
            results = self.segmenter(list(pixels.values()), **self.options) if pixels else []
            for path, result in zip(pixels, results):
                self._finish(dataclasses.replace(result, file_name=str(path)), images[path])
                seconds = (time.perf_counter() - begin) / len(pixels)
                print(f"{path}{arrow(images[path])}: {len(result.segments)} segments, {seconds:.2f} s")
            self.bar.advance(task, min(step, len(paths) - start))
        return unreadable

    def _finish(self, result: Segmentation, drawing: Path | None) -> None:
        if drawing is not None:
            *drawings, segments = written(drawing, self.args.tasks, is_video=False)
            result.save(segments)
            for kind, path in zip(self.args.tasks, drawings):
                result.save(path, kind)
        if self.args.show:
            show(result.draw(self.args.tasks[0]), is_frame=False)

    def video(self, video: VideoFile | Camera, source: Path, drawing: Path | None) -> bool:
        """Does a video, one frame at a time; the files are whole also when it is interrupted. Returns whether any
        frame could be read."""
        times: collections.deque[float] = collections.deque()

        def images() -> Iterator[np.ndarray]:
            for frame in video:
                times.append(frame.seconds)
                yield frame.image

        task = self.bar.add_task(source.name, total=video.num_frames or None)
        start, number = time.perf_counter(), 0
        with contextlib.ExitStack() as stack:
            writers, segments = [], None
            for result in self.segmenter.video(images(), **self.options):
                if drawing is not None and segments is None:
                    *paths, records = written(drawing, self.args.tasks, is_video=True)
                    segments = stack.enter_context(records.open("w", encoding="utf-8"))
                    writers = [stack.enter_context(VideoWriter(path, rate=video.rate)) for path in paths]
                drawings = [result.draw(kind) for kind in self.args.tasks]
                seconds = times.popleft()
                for writer, drawn in zip(writers, drawings):
                    writer.write(drawn, seconds)
                if segments is not None:
                    found = [segment.record() for segment in result.segments]
                    line = {"frame": number, "seconds": round(seconds, 4), "segments": found}
                    print(json.dumps(line, ensure_ascii=False), file=segments)
                if self.args.show:
                    show(drawings[0], is_frame=True)
                number += 1
                self.bar.advance(task)
        if number == 0:
            print(f"error: '{source}' has no frame that can be read", file=sys.stderr)
            return False
        if video.num_unreadable:
            print(f"{source}: {video.num_unreadable} frames could not be read and are left out", file=sys.stderr)
        drawing = writers[0].path if writers else None
        print(f"{source}{arrow(drawing)}: {number} frames, {time.perf_counter() - start:.2f} s")
        return True


def arrow(drawing: Path | None) -> str:
    return "" if drawing is None else f" -> {drawing}"


def open_videos(paths: Iterable[Path]) -> dict[Path, VideoFile]:
    """The videos that can be opened; of the others it is said why not."""
    videos = {}
    for path in paths:
        try:
            videos[path] = VideoFile(path)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
    return videos


def build(args: argparse.Namespace) -> Segmenter | ExportedSegmenter:
    """The model, or with `--runtime onnx` the exported folder of `--weights`.

    Raises:
        ValueError: there is no such folder, or flags that need the model.
    """
    if args.runtime == "torch":
        return Segmenter(load_config(args.config_file, args.opts), weights=args.weights, device=args.device)
    own = {"--unknown": args.unknown, "--others": args.others, "--opts": args.opts}
    if used := [flag for flag, value in own.items() if value]:
        raise InputError(f"--runtime onnx has no {', '.join(used)}, which need the model: use --runtime torch")
    if args.weights is None:
        raise InputError("--runtime onnx needs --weights FOLDER, one that tools/export.py wrote")
    return ExportedSegmenter(args.weights, providers=lookup("device of onnxruntime", args.device or "cpu", PROVIDERS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if an image or a video could not be read (the others are done)."""
    args = parse_arguments(arguments)
    options = {"vocabulary": args.vocabulary, "min_score": args.confidence_threshold, "batch_size": args.batch_size}
    if args.runtime == "torch":
        options["vocabulary"] = None if args.vocabulary is None else read_vocabulary(args.vocabulary)
        options |= {"unknown": args.unknown, "others": args.others}
    videos: dict[Path, VideoFile | Camera]
    if args.webcam is not None:
        files = [Path(f"webcam_{args.webcam}")]
        names, videos = files, {files[0]: Camera(args.webcam)}
    else:
        files = find_files(args.input) if args.input else [Path(args.video_input).expanduser()]
        names = [path for path in files if has_video_name(path)] if args.input else files
        videos = dict(open_videos(names))
    drawings: dict[Path, Path | None] = dict.fromkeys(files)
    if args.output is not None:
        planned = plan_outputs(files, Path(args.output).expanduser(), videos=names, tasks=args.tasks)
        drawings = dict(zip(files, planned))
        check_writable(planned[0].parent)
    if args.show:
        open_window()
    segmenter = build(args)
    unreadable = len(names) - len(videos)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        demo = Demo(segmenter, args, options, bar)
        images = {path: drawings[path] for path in files if path not in names}
        unreadable += demo.images(images) if images else 0
        for path, video in videos.items():
            unreadable += not demo.video(video, path, drawings[path])
    if unreadable:
        print(f"error: {unreadable} of {len(files)} inputs could not be read", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(run_program(main))
