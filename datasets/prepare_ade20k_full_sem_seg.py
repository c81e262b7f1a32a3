"""ADE20K-Full: images and 16-bit label maps of 847 classes.

    python datasets/prepare_ade20k_full_sem_seg.py [--root DIR] [--splits val] [--workers N]

Ask for access at https://ade20k.csail.mit.edu/request_data/; download ADE20K_2021_17_01.zip, and index_ade20k.pkl of
https://ade20k.csail.mit.edu/toolkit/index_ade20k.pkl if the archive has none.

    ADE20K_2021_17_01/
      index_ade20k.pkl
      images/ADE/{training,validation}/**/*.jpg, *_seg.png
      images_detectron2/{training,validation}/*.jpg        made here: 25,574 and 2,000 images
      annotations_detectron2/{training,validation}/*.tif   made here: 16 bits, 0..846 the class, 65535 none

Images whose shorter side is above 512 pixels are made smaller, so that it has 512, and all are encoded anew as JPEG
of quality 75: published numbers were measured on such images. The comment in each JPEG file says so.
"""

from __future__ import annotations

import functools
import mmap
import sys
from pathlib import Path

import cv2
import numpy as np
from ade20k_tables import FULL_IDS

from fcclip.errors import InputError, run_program
from fcclip.preparation.files import COLOUR_MODES, check_size, read_pixels, write_image
from fcclip.preparation.programs import FOLDERS, Download, Preparation, Task, main_of

SHORT_SIDE = 512  # pixels, at most
JPEG_QUALITY = 75
COMMENT = f"fcclip prepare_ade20k_full_sem_seg.py: shorter side at most {SHORT_SIDE} pixels, quality {JPEG_QUALITY}"
IGNORE_LABEL = 65535
TABLE = np.full(1 << 16, IGNORE_LABEL, np.uint16)  # from ADE20K's number of an object to the class
TABLE[list(FULL_IDS)] = range(len(FULL_IDS))
IMAGE_MODES = (*COLOUR_MODES, "L", "CMYK", "P")


def downloads(split: str) -> list[Download]:
    return [
        Download(
            "ADE20K_2021_17_01/images",
            "images and annotations of ADE20K-Full",
            "ADE20K_2021_17_01.zip (personal link from https://ade20k.csail.mit.edu/request_data/)",
        ),
        Download(
            "ADE20K_2021_17_01/index_ade20k.pkl",
            "the list of images of ADE20K-Full",
            "https://ade20k.csail.mit.edu/toolkit/index_ade20k.pkl, put into ADE20K_2021_17_01",
        ),
    ]


def plan(root: Path, split: str) -> list[Task]:
    ade = root / "ADE20K_2021_17_01"
    images, labels = (ade / kind / FOLDERS[split] for kind in ("images_detectron2", "annotations_detectron2"))
    tasks = []
    for folder, name in read_index(ade / "index_ade20k.pkl"):
        if (name.split("_")[1:2] == ["val"]) == (split == "val"):
            stem = name.removesuffix(".jpg")
            inputs = (root / folder / name, root / folder / f"{stem}_seg.png")
            tasks.append(Task(stem, inputs, (images / f"{stem}.jpg", labels / f"{stem}.tif")))
    return tasks


@functools.lru_cache(maxsize=1)  # of 780 MB
def read_index(path: Path) -> list[tuple[str, str]]:
    """(folder, file name) of each image, the folder below that of all data sets; no code of the pickle is run.

    Raises:
        ValueError: it is not such an index.
    """
    from fcclip.weights.pickles import PickleReader  # not in every process: it imports torch

    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            index = PickleReader(stream).load()
        rows = list(zip(index["folder"], index["filename"], strict=True))
    except Exception as error:  # damaged pickles raise anything
        raise InputError(
            f"{path}: cannot be read as the index of ADE20K: {error!r}. Download it again from "
            "https://ade20k.csail.mit.edu/toolkit/index_ade20k.pkl."
        ) from error
    wrong = [row for row in rows if not all(isinstance(text, str) for text in row) or ".." in row[0] or "/" in row[1]]
    if wrong:
        raise InputError(f"{path}: {wrong[0]!r} is not a folder and a file name. Download the index again.")
    return rows


def make(task: Task) -> None:
    path, objects = task.inputs
    pixels = read_pixels(objects, modes=COLOUR_MODES)
    check_size(objects, pixels, path)
    labels = TABLE[pixels[..., 0].astype(np.int32) // 10 * 256 + pixels[..., 1]]
    image = read_pixels(path, modes=IMAGE_MODES, convert="RGB")
    size = smaller_size(*labels.shape)
    if size != labels.shape:
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    write_image(task.outputs[0], image, quality=JPEG_QUALITY, comment=COMMENT)
    write_image(task.outputs[1], labels, compression="tiff_adobe_deflate")


def smaller_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with a shorter side of at most SHORT_SIDE; the other one is rounded."""
    shorter = min(height, width)
    if shorter <= SHORT_SIDE:
        return height, width
    return round(height * SHORT_SIDE / shorter), round(width * SHORT_SIDE / shorter)


PREPARATION = Preparation(
    title="ADE20K-Full semantic",
    dataset="openvocab_ade20k_full_sem_seg_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
