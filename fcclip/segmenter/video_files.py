"""Frames from video files and cameras, and video files that browsers play. PyAV does the work (extra `video`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

from fcclip.errors import InputError, MissingFileError, NotInstalledError

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_RATE = 30  # frames a second, where neither file nor camera says
_TICKS = 90_000  # a second; times between frames need not be equal
_CODECS = {  # in the order of preference: options, none of which is slow
    "libx264": {"crf": "20", "preset": "veryfast"},
    "libvpx-vp9": {"crf": "31", "b": "0", "deadline": "realtime", "cpu-used": "8"},
}


@dataclass(frozen=True)
class Frame:
    """One image of a video: (h, w, 3) uint8 RGB, upright, and its time from the first in seconds."""

    image: np.ndarray
    seconds: float


class VideoFile:
    """The frames of a video file, one in memory at a time.

    Attributes:
        rate: frames a second, on average.
        num_frames: what the file says, or about so many; 0 if that is not known.
        num_unreadable: frames, after a pass, that could not be decoded or that a file which was cut off lacks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a video, or in an unknown codec.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.num_unreadable = 0
        with self._opened() as (container, stream):
            self.rate = Fraction(stream.average_rate or _RATE)
            seconds = (container.duration or 0) / 1_000_000
            self.num_frames = stream.frames or round(seconds * self.rate)

    def __iter__(self) -> Iterator[Frame]:
        av, first, number = _av(), None, 0
        self.num_unreadable = 0
        with self._opened() as (container, stream):
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)  # nothing comes after an error here
                    if packet is None:
                        break
                    pictures = packet.decode()
                except av.error.FFmpegError:
                    self.num_unreadable += 1
                    continue
                for picture in pictures:
                    seconds = number / float(self.rate) if picture.time is None else picture.time
                    first = seconds if first is None else first
                    image = np.rot90(picture.to_ndarray(format="rgb24"), picture.rotation // 90)
                    yield Frame(np.ascontiguousarray(image), seconds - first)
                    number += 1
            self.num_unreadable = max(self.num_unreadable, stream.frames - number)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        if not self.path.is_file():
            raise MissingFileError(f"video '{self.path}' does not exist (looked at {self.path.absolute()})")
        av = _av()
        try:
            container = av.open(str(self.path))
        except av.error.FFmpegError as error:
            raise InputError(f"'{self.path}' cannot be read as a video: {error.strerror}") from error
        with container:
            if not container.streams.video:
                raise InputError(f"'{self.path}' has no video in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(
                    f"the video in '{self.path}' is in a codec that this build of FFmpeg does not know; convert it "
                    "elsewhere, e.g. to H.264"
                )
            stream.thread_type = "AUTO"
            yield container, stream


class Camera:
    """The frames of a camera, as they come; what comes while nobody asks is dropped.

    Args:
        index: 0 is the first camera.

    Raises:
        ValueError: there is no such camera, or another program has it.
    """

    num_frames = num_unreadable = 0

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._capture = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            raise InputError(f"there is no camera {index}, or another program uses it; for a file say --video-input")
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        self.rate = Fraction(round(self._capture.get(cv2.CAP_PROP_FPS)) or _RATE)

    def __iter__(self) -> Iterator[Frame]:
        start = None
        try:
            while True:
                is_read, image = self._capture.read()
                if not is_read:
                    raise InputError(f"camera {self.index} gives no more images; is it still connected?")
                now = time.monotonic()
                start = now if start is None else start
                yield Frame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), now - start)
        finally:
            self._capture.release()


class VideoWriter:
    """Writes a video file that browsers play: H.264, or VP9 where the name ends in .webm or FFmpeg lacks the former.

    To be used with `with`; a file that is left early holds what was written so far. Odd sides grow by a pixel.

    Args:
        path: its ending says the container; .webm is put in its place where only VP9 can be written.
        rate: frames a second, about.

    Attributes:
        path: what is written.

    Raises:
        ValueError: neither codec is there, or an unknown ending.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: str | Path, *, rate: Fraction | float) -> None:
        av = _av()
        path = Path(path).expanduser()
        codecs = [codec for codec in _CODECS if codec in av.codecs_available]
        if path.suffix.lower() == ".webm":
            codecs = codecs and [codec for codec in codecs if codec != "libx264"]
        if not codecs:
            raise InputError(f"cannot write '{path}': this build of FFmpeg has none of {', '.join(_CODECS)}")
        self.path = path if codecs[0] == "libx264" else path.with_suffix(".webm")
        self._codec, self._rate = codecs[0], Fraction(rate).limit_denominator(1001)
        options = {"movflags": "+faststart"} if self.path.suffix.lower() in (".mp4", ".m4v", ".mov") else {}
        try:
            self._container = av.open(str(self.path), "w", options=options)
        except (av.error.FFmpegError, ValueError) as error:
            raise InputError(f"cannot write '{self.path}': {error}") from error
        self._stream, self._last = None, -1

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._container:
            if self._stream is not None:
                self._container.mux(self._stream.encode())

    def write(self, image: np.ndarray, seconds: float) -> None:
        """(h, w, 3) uint8 RGB, shown from `seconds` on; one of another size than the first is scaled to it."""
        if self._stream is None:
            self._stream = self._container.add_stream(self._codec, rate=self._rate, options=dict(_CODECS[self._codec]))
            height, width = (side + side % 2 for side in image.shape[:2])
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
        frame = _av().VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._last = max(round(seconds * _TICKS), self._last + 1)
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(frame))


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise NotInstalledError(f"videos need PyAV ({error}): pip install 'fcclip[video]'") from error
    return av
