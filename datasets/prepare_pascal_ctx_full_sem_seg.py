"""Pascal Context with 459 classes: 16-bit label maps.

    python datasets/prepare_pascal_ctx_full_sem_seg.py [--root DIR] [--splits val] [--workers N]

Run prepare_pascal_ctx_sem_seg.py first, which makes the images. Download trainval.tar.gz, the label maps, from
https://www.cs.stanford.edu/~roozbeh/pascal-context/, and unpack it into VOCdevkit/VOC2010.

    VOCdevkit/VOC2010/
      trainval/*.mat                                    10,103 label maps: 0 none, 1..459 the class
    pascal_ctx_d2/
      images/{training,validation}/*.jpg                made by prepare_pascal_ctx_sem_seg.py: 4,998 and 5,104
      annotations_ctx459/{training,validation}/*.tif    made here: 16 bits, 0..458 the class, 65535 none
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import scipy.io

from fcclip.data.datasets.files import files_by_stem
from fcclip.errors import InputError, MissingFileError, run_program
from fcclip.preparation.files import check_size, write_image
from fcclip.preparation.programs import FOLDERS, Download, Preparation, Task, main_of

NUM_CLASSES = 459
IGNORE_LABEL = 65535


def downloads(split: str) -> list[Download]:
    return [
        Download(
            "VOCdevkit/VOC2010/trainval",
            "label maps of Pascal Context",
            "trainval.tar.gz (https://www.cs.stanford.edu/~roozbeh/pascal-context/), unpacked into VOCdevkit/VOC2010",
        ),
        Download(
            f"pascal_ctx_d2/images/{FOLDERS[split]}",
            "images of Pascal Context",
            "python datasets/prepare_pascal_ctx_sem_seg.py, which makes it",
        ),
    ]


def plan(root: Path, split: str) -> list[Task]:
    context = root / "pascal_ctx_d2"
    target = context / "annotations_ctx459" / FOLDERS[split]
    maps = root / "VOCdevkit" / "VOC2010" / "trainval"
    return [
        Task(stem, (image, maps / f"{stem}.mat"), (target / f"{stem}.tif",))
        for stem, image in files_by_stem(context / "images" / FOLDERS[split], ".jpg").items()
    ]


def make(task: Task) -> None:
    image, path = task.inputs
    labels = read_label_map(path)
    check_size(path, labels, image)
    if labels.max() > NUM_CLASSES:
        raise InputError(f"{path}: value {labels.max()} stands for no class, expected 0..{NUM_CLASSES}.")
    write_image(task.outputs[0], labels - np.uint16(1), compression="tiff_adobe_deflate")  # 0 wraps around to 65535


def read_label_map(path: Path) -> np.ndarray:
    """(H, W) uint16, the variable LabelMap of a .mat file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a .mat file, or has no such variable.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file. Unpack the download again.")
    try:
        labels = scipy.io.loadmat(path, variable_names=["LabelMap"])["LabelMap"]
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{path}: cannot be read as a label map: {error!r}. Unpack the download again.") from error
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or labels.size == 0 or labels.min() < 0:
        raise InputError(f"{path}: LabelMap is {labels.dtype} {labels.shape}, expected (height, width) whole numbers.")
    return labels.astype(np.uint16)


PREPARATION = Preparation(
    title="Pascal Context 459",
    dataset="openvocab_pascal_ctx459_sem_seg_{split}",
    downloads=downloads,
    plan=plan,
    make=make,
)
main = main_of(PREPARATION, __doc__)

if __name__ == "__main__":
    sys.exit(run_program(main))
