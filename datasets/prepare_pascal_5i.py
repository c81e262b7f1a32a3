"""PASCAL-5^i: masks of VOC 2012 with those of SBD, and the lists of its four folds.

    python datasets/prepare_pascal_5i.py [--root DIR] [--splits val] [--workers N]

Download VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/), and either SBD (benchmark.tgz,
http://home.bharathh.info/pubs/codes/SBD/download.html) or the masks SegmentationClassAug, as others offer them.

    VOCdevkit/VOC2012/
      ImageSets/Segmentation/{train,val}.txt
      JPEGImages/*.jpg
      SegmentationClass/*.png
      SegmentationClassAug/*.png              all masks; here or beside VOCdevkit, made there if they are nowhere
    benchmark_RELEASE/dataset/                SBD: {train,val}.txt, cls/*.mat
    pascal_5i/                                made here
      {trn,val}/fold{0..3}.txt                a line <image>__<class> for each pair
      {train,val}.json                        pixels of each class in each mask
"""

from __future__ import annotations

import sys
from pathlib import Path

import scipy.io

from fcclip.data.datasets.folds import PASCAL_5I
from fcclip.errors import run_program
from fcclip.preparation.files import check_size, has_content, read_pixels, write_image
from fcclip.preparation.folds import LARGE_PX, class_pixels, first_that, pixel_file, prepare
from fcclip.preparation.programs import Download, Preparation, Task, build_parser

MASKS = "SegmentationClassAug"
SOURCE = "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/)"
VOC = "VOCdevkit/VOC2012"
SMALLEST = {"train": 1, "val": LARGE_PX}  # pixels of a pair


def main(arguments: list[str] | None = None) -> int:
    return prepare(PREPARATION, build_parser(__doc__).parse_args(arguments), folds=PASCAL_5I, smallest=SMALLEST)


def downloads(split: str) -> list[Download]:
    return [
        Download(f"{VOC}/ImageSets/Segmentation/val.txt", "the images of the val set", SOURCE),
        Download(f"{VOC}/JPEGImages", "images of VOC 2012", SOURCE),
    ]


def plan(root: Path, split: str) -> list[Task]:
    voc, sbd = root / VOC, root / "benchmark_RELEASE" / "dataset"
    val = names_in(voc / "ImageSets" / "Segmentation" / "val.txt")
    if (sbd / "cls").is_dir():
        train = names_in(voc / "ImageSets" / "Segmentation" / "train.txt")
        train = train.union(*(names_in(sbd / f"{part}.txt") for part in ("train", "val"))) - val
        mask_of = {name: voc / "SegmentationClass" / f"{name}.png" for name in train | val}
        sources = {name: mask if mask.is_file() else sbd / "cls" / f"{name}.mat" for name, mask in mask_of.items()}
        outputs = {name: (root / MASKS / f"{name}.png",) for name in sources}
    else:
        places = [root / MASKS, voc / MASKS, sbd / "cls"]
        folder = first_that(lambda place: any(place.glob("*.png")), places, f"the masks of {split}, or SBD")
        sources = {path.stem: path for path in folder.glob("*.png")}
        train, outputs = set(sources) - val, dict.fromkeys(sources, ())
    return [
        Task(
            name=name,
            inputs=(voc / "JPEGImages" / f"{name}.jpg", sources.get(name, root / MASKS / f"{name}.png")),
            outputs=outputs.get(name, ()),
        )
        for name in sorted(train if split == "train" else val)
    ]


def names_in(path: Path) -> set[str]:
    return set(path.read_text(encoding="ascii").split())


def make(task: Task) -> dict:
    image, source = task.inputs
    source = next(filter(has_content, task.outputs), source)
    mask = segmentation_of(source) if source.suffix == ".mat" else read_pixels(source, modes=("P", "L"))
    check_size(source, mask, image)
    for output in task.outputs:
        if output != source:
            write_image(output, mask)
    return class_pixels(mask, PASCAL_5I, source)


def segmentation_of(path: Path):
    """(height, width) uint8 classes of a file of SBD."""
    return scipy.io.loadmat(path, mat_dtype=False)["GTcls"]["Segmentation"][0, 0].astype("uint8")


PREPARATION = Preparation(
    title="PASCAL-5^i",
    dataset="",  # lists of pairs are counted, not images
    downloads=downloads,
    plan=plan,
    make=make,
    annotations=pixel_file(PASCAL_5I, "prepare_pascal_5i"),
)

if __name__ == "__main__":
    sys.exit(run_program(main))
