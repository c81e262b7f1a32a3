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
from collections.abc import Callable, Mapping
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
# Variants: without the last pair of each list, which the published reader drops; the published test of COCO-20^i;
# classes drawn uniformly with a fixed seed, as others test; all novel classes prompted for each image at once.
SPLITS = ("train", "train_strict", "train_published", "val", "val_first1000", "val_uniform1000", "val_multiclass")

Pairs = list[tuple[str, int]]  # image, position of the class


@dataclass(frozen=True)
class Folds:
    """One of the two benchmarks.

    Args:
        name: of it, of the folder of its lists and of its vocabulary.
        fold_of: position of a class in the vocabulary -> the fold in which it is novel.
        first_class: number of the first class in the lists.
        counts: kind -> pairs of each list, as published.
        files: field of a record -> places where the file of an {image} may be; {kind} is train or val. Values of masks
            are 0 background, positions plus 1, and 255.
    """

    name: str
    fold_of: Callable[[int], int]
    first_class: int
    counts: Mapping[str, tuple[int, ...]]
    files: Mapping[str, tuple[str, ...]]

    def novel(self, fold: int) -> list[int]:
        """Positions of the novel classes of a fold."""
        return [index for index in range(len(Vocabulary.builtin(self.name))) if self.fold_of(index) == fold]

    def list_file(self, root: Path, kind: str, fold: int) -> Path:
        """The list of the pairs whose class is novel in a fold."""
        return root / self.name / KINDS[kind] / f"fold{fold}.txt"

    def read(self, root: Path, kind: str, fold: int, *, drops_last: bool = False) -> Pairs:
        """The pairs of a list; with `drops_last` without that of the last line.

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

    def places(self, root: Path, kind: str, image: str) -> dict[str, str]:
        """The files of an image, by field of a record.

        Raises:
            MissingFileError: one is at none of its places; names them all.
        """
        files = {}
        for field, templates in self.files.items():
            paths = [root / template.format(kind=kind, image=image) for template in templates]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                raise MissingFileError(f"none of these files exists: {', '.join(map(str, paths))}. {WHERE_DATA_IS}")
            files[field] = str(path)
        return files


_VOC, _COCO = "VOCdevkit/VOC2012/", ("", "COCO2014/", "coco/")
PASCAL_5I = Folds(
    name="pascal_5i",
    fold_of=lambda index: index // 5,
    first_class=1,
    counts={"train": (2_885, 3_816, 6_529, 2_325), "val": (346, 451, 725, 346)},
    files={
        "file_name": (_VOC + "JPEGImages/{image}.jpg",),
        "sem_seg_file_name": tuple(folder + "SegmentationClassAug/{image}.png" for folder in ("", _VOC)),
    },
)
COCO_20I = Folds(
    name="coco_20i",
    fold_of=lambda index: index % NUM_FOLDS,
    first_class=0,
    counts={"train": (75_015, 36_564, 29_437, 29_475), "val": (35_783, 17_912, 14_563, 14_315)},
    files={
        "file_name": tuple(folder + "{kind}2014/{image}.jpg" for folder in _COCO),
        "sem_seg_file_name": tuple(
            f"{folder}{name}/{{kind}}2014/{{image}}.png" for folder in _COCO for name in ("annotation", "annotations")
        ),
    },
)


def fold_dataset(root: Path, *, name: str, split: str, folds: Folds, fold: int, names: str = "") -> Dataset:
    """One fold of a benchmark.

    Args:
        root: folder of all data sets.
        name: as registered.
        split: of `SPLITS`.
        folds: the benchmark.
        fold: 0 to 3.
        names: "" for the published strings, which have no spaces; "_readable" for those with.
    """
    if not 0 <= fold < NUM_FOLDS:
        raise InputError(f"{folds.name} has the folds 0 to {NUM_FOLDS - 1}, got {fold}")
    kind, _, variant = split.partition("_")
    novel, source = folds.novel(fold), folds.name + names
    classes = [index for index in range(len(Vocabulary.builtin(source))) if (index in novel) == (kind == "val")]
    own = folds.counts[kind]
    count = own[fold] if kind == "val" else sum(own) - own[fold]
    dataset = _dataset(
        name=name,
        vocabulary=(source, f"{source}_fold{fold}_{kind}", classes),
        pairs=partial(_pairs, root, folds, fold, kind, variant),
        places=partial(folds.places, root, kind),
        folds=folds,
        is_whole=variant == "multiclass",
    )
    published = {"": count, "published": count - (NUM_FOLDS - 1)}.get(variant)
    return dataclasses.replace(dataset, published_count=published, benchmark=f"{folds.name} fold {fold}")


def transfer_dataset(root: Path, *, name: str, fold: int) -> Dataset:
    """PASCAL VOC for a model that was trained on a fold of COCO-20^i: the pairs of all four test lists of PASCAL-5^i
    whose class is novel in that fold. All twenty classes of VOC are classes of COCO under the same published string."""
    novel = {Vocabulary.builtin(COCO_20I.name).class_names[index] for index in COCO_20I.novel(fold)}
    names = Vocabulary.builtin(PASCAL_5I.name).class_names
    classes = [index for index, class_name in enumerate(names) if class_name in novel]

    def pairs() -> Pairs:
        every = [pair for other in range(NUM_FOLDS) for pair in PASCAL_5I.read(root, "val", other)]
        return [pair for pair in every if pair[1] in classes]

    vocabulary = (PASCAL_5I.name, f"pascal_voc_of_coco_20i_fold{fold}", classes)
    places = partial(PASCAL_5I.places, root, "val")
    return _dataset(name=name, vocabulary=vocabulary, pairs=pairs, places=places, folds=PASCAL_5I)


def _dataset(
    *,
    name: str,
    vocabulary: tuple[str, str, list[int]],
    pairs: Callable[[], Pairs],
    places: Callable[[str], dict[str, str]],
    folds: Folds,
    is_whole: bool = False,
) -> Dataset:
    """Pairs of an image and one of some classes, or with `is_whole` their images; `vocabulary` is a built-in one, what
    it is called with these classes alone, and their positions in it."""
    source, own_name, classes = vocabulary

    def read_vocabulary() -> Vocabulary:
        whole = Vocabulary.builtin(source)
        return dataclasses.replace(whole, name=own_name, classes=tuple(whole.classes[index] for index in classes))

    class_names = read_vocabulary().class_names

    def load() -> list[dict[str, Any]]:
        """One record a pair: `file_name, sem_seg_file_name, image_id, category_id` (contiguous), `mask_value` and
        `class_name`, what is prompted; or an image: `mask_values`, those of the classes."""
        if is_whole:
            images = dict.fromkeys(image for image, _ in pairs())
            values = [index + 1 for index in classes]
            return [{**places(image), "image_id": image, "mask_values": values} for image in images]
        files, position = functools.cache(places), {index: contiguous for contiguous, index in enumerate(classes)}
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
        "evaluator_type": "novel_classes" if is_whole else "one_class_pairs",
    }
    return Dataset(name=name, metadata=metadata, load=load, vocabulary=own_name, read_vocabulary=read_vocabulary)


def _pairs(root: Path, folds: Folds, fold: int, kind: str, variant: str) -> Pairs:
    own = folds.read(root, kind, fold)
    if kind == "train":
        drops = variant == "published"
        others = (other for other in range(NUM_FOLDS) if other != fold)
        base = [pair for other in others for pair in folds.read(root, kind, other, drops_last=drops)]
        novel_images = {image for image, _ in own} if variant == "strict" else set()
        return [pair for pair in base if pair[0] not in novel_images]
    if variant == "first1000":
        return sorted(own)[:MOST_PAIRS]
    return _uniform(own) if variant == "uniform1000" else own


def _uniform(pairs: Pairs) -> Pairs:
    """Up to 1000 different pairs in a fixed order, each of a class drawn uniformly of those that have some left."""
    rng, left, drawn = random.Random(0), {}, []
    for pair in sorted(pairs):
        left.setdefault(pair[1], []).append(pair)
    while left and len(drawn) < MOST_PAIRS:
        index = rng.choice(sorted(left))
        drawn.append(left[index].pop(rng.randrange(len(left[index]))))
        if not left[index]:
            del left[index]
    return drawn
