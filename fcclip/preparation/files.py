"""Reading what was downloaded strictly, and writing whole files or none; for datasets/prepare_*.py.

Pixels are taken as they are stored; whatever is not as expected is an error that names the file and says what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcclip import files
from fcclip.data.dataset import collector_paused
from fcclip.data.images import opened
from fcclip.errors import InputError, MissingFileError

LABEL_MODES = ("L", "P", "I;16", "I")  # one value a pixel: grey, palette index, 16 bits
COLOUR_MODES = ("RGB", "RGBA")
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".tif": "TIFF"}
_REMEDY = "Unpack the download again."


# ---- images ----


def pair_by_stem(images: Mapping[str, Path], *others: Mapping[str, Path]) -> list[tuple[str, tuple[Path, ...]]]:
    """(stem, files) of each image and its companions.

    Raises:
        ValueError: an image or companion is alone; names the first ones.
    """
    for other in others:
        alone = sorted(images.keys() ^ other.keys())
        if alone:
            folders = " and ".join(str(next(iter(paths.values())).parent) for paths in (images, other) if paths)
            raise InputError(
                f"{folders}: images that are in one of them only: {len(alone)}, e.g. {files.listed(alone)}. {_REMEDY}"
            )
    return [(stem, (path, *(other[stem] for other in others))) for stem, path in images.items()]


def read_pixels(path: Path, *, modes: Sequence[str] = LABEL_MODES, convert: str | None = None) -> np.ndarray:
    """(H, W) or (H, W, channels) values as stored: no turning by EXIF, and unless `convert` names a mode, no conversion
    and no colours of a palette.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, is cut off, or of another mode than those.
    """
    with opened(path, if_missing=_REMEDY, if_broken=_REMEDY) as image:
        if image.mode in modes:
            return np.array(image if convert is None else image.convert(convert))
        mode = image.mode
    raise InputError(
        f"{path}: pixels are of mode {mode}, expected {' or '.join(modes)}. Was the file converted by another program?"
    )


def check_size(path: Path, pixels: np.ndarray, of: Path) -> None:
    """Compares the size of the pixels of `path` with that of the image `of`.

    Raises:
        ValueError: they differ, or `of` is not an image.
        FileNotFoundError: there is no such image.
    """
    height, width = stored_size(of)
    if pixels.shape[:2] != (height, width):
        raise InputError(
            f"{path}: {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), but its image {of} has "
            f"{height} x {width}. They do not belong together; unpack the download again."
        )


def stored_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image as it is stored, whatever its EXIF block says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    with opened(path, if_missing=_REMEDY, if_broken=_REMEDY) as image:
        return image.height, image.width


def remap(values: np.ndarray, table: np.ndarray, path: Path, *, invalid: int) -> np.ndarray:
    """table[values]; a value that the table calls `invalid` or does not reach is an error that names the file."""
    known = values < len(table)
    mapped = table[np.where(known, values, 0)]
    wrong = ~known | (mapped == invalid)
    if wrong.any():
        raise InputError(
            f"{path}: value {int(values[wrong][0])} stands for no class. This is not the file that is expected here, "
            "or is damaged."
        )
    return mapped


def id_colours(id_map: np.ndarray) -> np.ndarray:
    """(H, W) int segment ids -> (H, W, 3) uint8 as a panoptic PNG: R + 256 G + 65536 B."""
    return np.stack([id_map & 255, id_map >> 8 & 255, id_map >> 16 & 255], -1).astype(np.uint8)


def box_and_area(mask: np.ndarray) -> tuple[list[int], int]:
    """([x, y, width, height], number of pixels) of a (H, W) bool mask with at least one pixel."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1], int(np.count_nonzero(mask))


# ---- files ----


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A file to write, in the same folder, which becomes `path` when the block ends without an error.

    Unlike those of `fcclip.files.write_atomically`, hundreds of thousands of files are not flushed to the disk one by
    one. What a killed process leaves half-written is written over by the next one.
    """
    partial_file = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial_file
        os.replace(partial_file, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}. Is the disk full, or the folder not writable?") from error
    finally:
        with contextlib.suppress(OSError):
            partial_file.unlink(missing_ok=True)


def write_image(path: Path, pixels: np.ndarray, **options: Any) -> None:
    """Writes an image, whole or not at all; the format is that of the ending: png, jpg or tif."""
    with atomically(path) as file:
        Image.fromarray(pixels).save(file, format=_FORMATS[path.suffix], **options)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with atomically(path) as file, open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream, separators=(",", ":"))


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all.

    Raises:
        FileNotFoundError: there is no such source.
    """
    if not source.is_file():
        raise MissingFileError(f"{source}: no such file. {_REMEDY}")
    with atomically(target) as file:
        shutil.copyfile(source, file)


def read_json(path: Path) -> Any:
    """The content of a JSON file of millions of objects; fails as `fcclip.files.read_json`."""
    with collector_paused():
        return files.read_json(path)


def has_content(path: Path) -> bool:
    """Whether it is a file that is not empty; after a power failure whole files may be."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
