"""PASCAL-5^i and COCO-20^i: four folds of classes each, and pairs of an image and one of its classes.

Of a fold some classes are *novel*, tested and never prompted in training, and the others are *base*. That is all that
"unseen" means here: images with novel objects stay in the training set and their pixels are negatives of what is
prompted. The splits `train_strict` leave such images out.

A split list is a text file of lines `<image>__<class>`, two digits or more, one for each pair whose class is novel in
its fold; a training set reads the lists of the other three folds.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fcclip.data.dataset import Dataset
from fcclip.data.datasets.files import WHERE_DATA_IS
from fcclip.data.datasets.metadata import class_metadata
from fcclip.errors import InputError, MissingFileError
from fcclip.vocabulary import Vocabulary

NUM_FOLDS = 4
IGNORE_LABEL = 255
MOST_PAIRS = 1000  # of a test with first1000 or uniform1000
KINDS = {"train": "trn", "val": "val"}  # -> folder of the lists
SPLITS = ("train", "train_strict", "train_published", "val", "val_first1000", "val_uniform1000")


@dataclass(frozen=True)
class Folds:
    """One of the two benchmarks.

    Args:
        name: of it, of the folder of its lists and of its vocabulary.
        fold_of: position of a class in the vocabulary -> the fold in which it is novel.
        first_class: number of the first class in the lists.
        counts: kind -> pairs of each fold's own list, as published.
        test_counts: pairs of the published test sets.
        images: (root, image, kind) -> places where the image may be.
        masks: the same of its mask, whose values are 0 background, positions plus 1, and 255.
    """

    name: str
    fold_of: Callable[[int], int]
    first_class: int
    counts: Mapping[str, tuple[int, ...]]
    images: Callable[[Path, str, str], list[Path]]
    masks: Callable[[Path, str, str], list[Path]]

    def novel(self, fold: int) -> list[int]:
        """Positions of the novel classes of a fold."""
        return [index for index in range(len(Vocabulary.builtin(self.name))) if self.fold_of(index) == fold]

    def list_file(self, root: Path, kind: str, fold: int) -> Path:
        """The list of the pairs whose class is novel in a fold."""
        return root / self.name / KINDS[kind] / f"fold{fold}.txt"

    def read(self, root: Path, kind: str, fold: int, *, drops_last: bool = False) -> list[tuple[str, int]]:
        """(image, position of the class) of each line of a list.

        Args:
            drops_last: what follows the last line break is not read, which costs the published reader a pair.

        Raises:
            MissingFileError: there is no list.
            InputError: a line that is no pair, or of another fold.
        """
        path = self.list_file(root, kind, fold)
        if not path.is_file():
            raise MissingFileError(
                f"{path} does not exist: python datasets/prepare_{self.name}.py makes the lists of {self.name}. "
                f"{WHERE_DATA_IS}"
            )
        lines = path.read_text(encoding="ascii").strip().split("\n")
        pairs = []
        for number, line in enumerate(lines[:-1] if drops_last else lines, 1):
            image, _, label = line.strip().rpartition("__")
            index = int(label) - self.first_class if label.isdigit() else -1
            if not image or index not in self.novel(fold):
                raise InputError(
                    f"{path}, line {number}: expected <image>__<class> with a class of fold {fold} "
                    f"({[novel + self.first_class for novel in self.novel(fold)]}), got '{line}'"
                )
            pairs.append((image, index))
        return pairs


def _pascal_images(root: Path, image: str, kind: str) -> list[Path]:
    return [root / "VOCdevkit" / "VOC2012" / "JPEGImages" / f"{image}.jpg"]


def _pascal_masks(root: Path, image: str, kind: str) -> list[Path]:
    folders = ("SegmentationClassAug", "VOCdevkit/VOC2012/SegmentationClassAug")
    return [root / folder / f"{image}.png" for folder in folders]


def _coco_images(root: Path, image: str, kind: str) -> list[Path]:
    return [root / folder / f"{kind}2014" / f"{image}.jpg" for folder in ("", "COCO2014", "coco")]


def _coco_masks(root: Path, image: str, kind: str) -> list[Path]:
    return [
        root / folder / name / f"{kind}2014" / f"{image}.png"
        for folder in ("", "COCO2014", "coco")
        for name in ("annotation", "annotations")
    ]


PASCAL_5I = Folds(
    name="pascal_5i",
    fold_of=lambda index: index // 5,
    first_class=1,
    counts={"train": (2_885, 3_816, 6_529, 2_325), "val": (346, 451, 725, 346)},
    images=_pascal_images,
    masks=_pascal_masks,
)
COCO_20I = Folds(
    name="coco_20i",
    fold_of=lambda index: index % NUM_FOLDS,
    first_class=0,
    counts={"train": (75_015, 36_564, 29_437, 29_475), "val": (35_783, 17_912, 14_563, 14_315)},
    images=_coco_images,
    masks=_coco_masks,
)


def fold_dataset(root: Path, *, name: str, split: str, folds: Folds, fold: int, names: str = "") -> Dataset:
    """One fold of a benchmark.

    Args:
        root: folder of all data sets.
        name: as registered.
        split: of `SPLITS`. `train_published` lacks the last pair of each list; `val_first1000` is the published test
            of COCO-20^i, `val_uniform1000` draws classes uniformly with a fixed seed, as others do.
        folds: the benchmark.
        fold: 0 to 3.
        names: "" for the published strings, which have no spaces; "readable" for those with.
    """
    if not 0 <= fold < NUM_FOLDS:
        raise InputError(f"{folds.name} has the folds 0 to {NUM_FOLDS - 1}, got {fold}")
    source = "_".join(filter(None, (folds.name, names)))
    kind, _, variant = split.partition("_")
    novel = folds.novel(fold)
    classes = [index for index in range(len(Vocabulary.builtin(source))) if (index in novel) == (kind == "val")]

    own = folds.counts[kind]
    count = own[fold] if kind == "val" else sum(own) - own[fold]
    dataset = _pair_dataset(
        name=name,
        source=source,
        vocabulary=f"{source}_fold{fold}_{kind}",
        classes=classes,
        pairs=partial(_pairs, root, folds, fold, kind, variant),
        places=partial(_places, root, folds, kind),
        folds=folds,
    )
    dataset.metadata["novel_means"] = "no prompt of a novel class in training; images with novel objects " + (
        "were left out" if variant == "strict" else "may be in it, as negatives"
    )
    published = {"": count, "published": count - (NUM_FOLDS - 1)}.get(variant)
    return dataclasses.replace(dataset, published_count=published, benchmark=f"{folds.name} fold {fold}")


def transfer_dataset(root: Path, *, name: str, fold: int) -> Dataset:
    """PASCAL VOC for a model that was trained on a fold of COCO-20^i: the pairs of all four test lists of PASCAL-5^i
    whose class is novel in that fold. All twenty classes of VOC are classes of COCO under the same published string."""
    novel = {Vocabulary.builtin(COCO_20I.name).class_names[index] for index in COCO_20I.novel(fold)}
    names = Vocabulary.builtin(PASCAL_5I.name).class_names
    classes = [index for index, class_name in enumerate(names) if class_name in novel]

    def pairs() -> list[tuple[str, int]]:
        every = [pair for other in range(NUM_FOLDS) for pair in PASCAL_5I.read(root, "val", other)]
        return [pair for pair in every if pair[1] in classes]

    return _pair_dataset(
        name=name,
        source=PASCAL_5I.name,
        vocabulary=f"pascal_voc_of_coco_20i_fold{fold}",
        classes=classes,
        pairs=pairs,
        places=partial(_places, root, PASCAL_5I, "val"),
        folds=PASCAL_5I,
    )


def _pair_dataset(
    *,
    name: str,
    source: str,
    vocabulary: str,
    classes: list[int],
    pairs: Callable[[], list[tuple[str, int]]],
    places: Callable[[str], dict[str, str]],
    folds: Folds,
) -> Dataset:
    """Pairs of an image and one of some classes, positions in the built-in vocabulary `source`."""

    def read_vocabulary() -> Vocabulary:
        whole = Vocabulary.builtin(source)
        return dataclasses.replace(whole, name=vocabulary, classes=tuple(whole.classes[index] for index in classes))

    position = {index: contiguous for contiguous, index in enumerate(classes)}
    class_names = read_vocabulary().class_names

    def load() -> list[dict[str, Any]]:
        """One record a pair: `file_name, sem_seg_file_name, image_id, category_id` (contiguous), `mask_value` and
        `class_name`, what is prompted."""
        files = functools.cache(places)
        return [
            {
                **files(image),
                "image_id": f"{image}__{index + folds.first_class:02d}",
                "category_id": position[index],
                "mask_value": index + 1,
                "class_name": class_names[position[index]],
            }
            for image, index in pairs()
        ]

    metadata = {
        **class_metadata(read_vocabulary(), things=False),
        "ignore_label": IGNORE_LABEL,
        "evaluator_type": "one_class_pairs",
    }
    return Dataset(name=name, metadata=metadata, load=load, vocabulary=vocabulary, read_vocabulary=read_vocabulary)


def _places(root: Path, folds: Folds, kind: str, image: str) -> dict[str, str]:
    files = {"file_name": folds.images, "sem_seg_file_name": folds.masks}
    return {key: str(_existing(of(root, image, kind))) for key, of in files.items()}


def _pairs(root: Path, folds: Folds, fold: int, kind: str, variant: str) -> list[tuple[str, int]]:
    own = folds.read(root, kind, fold)
    if kind == "train":
        others = [other for other in range(NUM_FOLDS) if other != fold]
        drops = variant == "published"
        base = [pair for other in others for pair in folds.read(root, kind, other, drops_last=drops)]
        novel_images = {image for image, _ in own} if variant == "strict" else set()
        return [pair for pair in base if pair[0] not in novel_images]
    if variant == "first1000":
        return sorted(own)[:MOST_PAIRS]
    return list(_uniform(own)) if variant == "uniform1000" else own


def _uniform(pairs: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Up to 1000 different pairs in a fixed order, each of a class drawn uniformly of those that have some left."""
    rng, left = random.Random(0), {}
    for pair in sorted(pairs):
        left.setdefault(pair[1], []).append(pair)
    for _ in range(min(MOST_PAIRS, len(pairs))):
        index = rng.choice(sorted(left))
        yield left[index].pop(rng.randrange(len(left[index])))
        if not left[index]:
            del left[index]


def _existing(places: list[Path]) -> Path:
    for place in places:
        if place.is_file():
            return place
    raise MissingFileError(f"none of these files exists: {', '.join(map(str, places))}. {WHERE_DATA_IS}")
