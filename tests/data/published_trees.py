"""Four-image trees of every published data set, as they lie on the disk when they are ready to use.

`write_tree(name, root)` writes one: folders and file names, bit depths, palettes and JSON fields are those of the real
data set; the images are small, of different sizes, and hold three classes in a quarter each and a fourth quarter
without a class. `CLASSES` tells which classes, so that a test knows what it has to find.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pycocotools.mask
from PIL import Image

from fcclip.vocabulary import Vocabulary

SIZES = ((48, 64), (64, 48), (45, 61), (50, 50))  # (height, width) of the four images


class Label(NamedTuple):
    """A class of a data set: its own id, and the contiguous one that it must become."""

    dataset_id: int
    contiguous: int


# The classes in the first three quarters of every image, for each data set; the third is a crowd in panoptic sets and
# in COCO's instances.
CLASSES: dict[str, tuple[Label, Label, Label]] = {
    "openvocab_coco_2017_{}_panoptic_with_sem_seg": (Label(90, 79), Label(187, 119), Label(18, 16)),
    "openvocab_coco_2017_{}_panoptic": (Label(90, 79), Label(187, 119), Label(18, 16)),
    "openvocab_coco_2017_{}": (Label(90, 79), Label(1, 0), Label(18, 16)),
    "openvocab_coco_2017_{}_stuff_sem_seg": (Label(1, 0), Label(92, 80), Label(182, 170)),
    "openvocab_lvis_v1_{}": (Label(1, 0), Label(1203, 1202), Label(7, 6)),
    "openvocab_ade20k_panoptic_{}": (Label(7, 7), Label(0, 0), Label(149, 149)),
    "openvocab_ade20k_instance_{}": (Label(7, 0), Label(149, 99), Label(12, 3)),
    "openvocab_ade20k_sem_seg_{}": (Label(0, 0), Label(1, 1), Label(149, 149)),
    "openvocab_cityscapes_fine_panoptic_{}": (Label(33, 18), Label(7, 0), Label(26, 13)),
    "openvocab_mapillary_vistas_panoptic_{}": (Label(1, 0), Label(65, 64), Label(55, 54)),
    "bdd10k_40_panoptic_{}": (Label(31, 30), Label(1, 0), Label(40, 39)),
    "bdd10k_{}_sem_seg": (Label(0, 0), Label(13, 13), Label(18, 18)),
    "openvocab_ade20k_full_sem_seg_{}": (Label(0, 0), Label(300, 300), Label(846, 846)),
    "openvocab_pascal_ctx59_sem_seg_{}": (Label(0, 0), Label(1, 1), Label(58, 58)),
    "openvocab_pascal_ctx459_sem_seg_{}": (Label(0, 0), Label(256, 256), Label(458, 458)),
    "openvocab_pascal20_sem_seg_{}": (Label(1, 0), Label(2, 1), Label(20, 19)),
    "openvocab_pascal21_sem_seg_{}": (Label(0, 0), Label(1, 1), Label(20, 20)),
}
LONG = {"train": "training", "val": "validation"}
CITY_TRAIN_IDS = {7: 0, 26: 13, 33: 18}


def template_and_split(name: str) -> tuple[str, str]:
    """The key of `CLASSES` that a name belongs to, and the split in it."""
    for template in CLASSES:
        for split in ("train", "val", "test"):
            if template.format(split) == name:
                return template, split
    raise KeyError(name)


def write_tree(name: str, root: Path) -> None:
    """Writes four images of the data set of this name with their ground truth below `root`."""
    template, split = template_and_split(name)
    WRITERS[template](root, split, CLASSES[template])


def quarters(height: int, width: int, values: Iterable[int], rest: int, dtype: type = np.int64) -> np.ndarray:
    """(height, width): three values in a quarter each, `rest` in the last one, at the bottom right."""
    pixels = np.full((height, width), rest, dtype)
    top_left, top_right, bottom_left = values
    pixels[: height // 2, : width // 2] = top_left
    pixels[: height // 2, width // 2 :] = top_right
    pixels[height // 2 :, : width // 2] = bottom_left
    return pixels


def write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    """A photo, as far as a reader can tell; the fourth of each tree is grey where the format is JPEG, as some of COCO's
    are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    (image.convert("L") if seed == 3 and path.suffix == ".jpg" else image).save(path)


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Numbers as grey: 8 or 16 bit, by their type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def write_ids(path: Path, ids: np.ndarray) -> None:
    """Segment ids as colours: R + 256 G + 65536 B."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def segments_of(ids: np.ndarray, categories: dict[int, int], crowds: Iterable[int] = ()) -> list[dict]:
    """`segments_info` of an id map: category of each id, and the ids that are crowds."""
    crowds = set(crowds)
    segments = []
    for segment_id, category in categories.items():
        rows, columns = np.nonzero(ids == segment_id)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        entry = {
            "id": segment_id,
            "category_id": category,
            "iscrowd": int(segment_id in crowds),
            "bbox": box,
            "area": len(rows),
        }
        segments.append(entry)
    return segments


def categories_of(vocabulary: str, *, things_only: bool = False) -> list[dict]:
    """The `categories` of an annotation file, all of them."""
    entries = [entry for entry in Vocabulary.builtin(vocabulary).classes if entry.thing or not things_only]
    return [{"id": entry.id, "name": entry.name, "isthing": int(entry.thing)} for entry in entries]


def rectangle(mask: np.ndarray) -> tuple[list[float], list[float]]:
    """(polygon, box) of a rectangular mask, in COCO's form."""
    rows, columns = np.nonzero(mask)
    left, top, right, bottom = (
        float(value) for value in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    )
    return [left, top, right, top, right, bottom, left, bottom], [left, top, right - left, bottom - top]


# ---- panoptic ----


def _coco_panoptic(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    coco, images, annotations = root / "coco", [], []
    for index, size in enumerate(SIZES):
        stem = f"{139 + 146 * index:012d}"
        write_image(coco / f"{split}2017" / f"{stem}.jpg", size, index)
        ids = quarters(*size, (3_226_956 + index, 6_979_964, 70_003), 0)
        write_ids(coco / f"panoptic_{split}2017" / f"{stem}.png", ids)
        labels = quarters(*size, (label.contiguous for label in classes), 255, np.uint8)
        write_labels(coco / f"panoptic_semseg_{split}2017" / f"{stem}.png", labels)
        categories = {int(ids[0, 0]): classes[0], int(ids[0, -1]): classes[1], int(ids[-1, 0]): classes[2]}
        segments = segments_of(
            ids, {segment_id: label.dataset_id for segment_id, label in categories.items()}, crowds=(70_003,)
        )
        annotations.append({"segments_info": segments, "file_name": f"{stem}.png", "image_id": int(stem)})
        images.append({"license": 2, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1], "id": int(stem)})
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    content["categories"] = categories_of("coco_panoptic")
    write_json(coco / "annotations" / f"panoptic_{split}2017.json", content)
    _write_coco_instances(root, split, SIZES, {1: classes[0], 3: classes[2]})


def _ade20k_panoptic(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    ade, images, annotations = root / "ADEChallengeData2016", [], []
    for index, size in enumerate(SIZES):
        stem = f"ADE_{split}_{index + 1:08d}"
        write_image(ade / "images" / LONG[split] / f"{stem}.jpg", size, index)
        ids = quarters(*size, (204 + 5 * 256, 120 + 120 * 256 + 120 * 65536, 91 + index), 0)
        write_ids(ade / f"ade20k_panoptic_{split}" / f"{stem}.png", ids)
        labels = quarters(*size, (label.contiguous for label in classes), 255, np.uint8)
        write_labels(ade / "annotations_detectron2" / LONG[split] / f"{stem}.png", labels)
        categories = {int(ids[0, 0]): classes[0], int(ids[0, -1]): classes[1], int(ids[-1, 0]): classes[2]}
        segments = segments_of(ids, {segment_id: label.dataset_id for segment_id, label in categories.items()})
        annotations.append({"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments})
        images.append({"id": stem, "file_name": f"{stem}.jpg", "width": size[1], "height": size[0]})
    content = {"images": images, "annotations": annotations, "categories": categories_of("ade20k_150")}
    write_json(ade / f"ade20k_panoptic_{split}.json", content)
    _write_ade20k_instances(root, split, {1: classes[0], 3: classes[2]})


def _cityscapes(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    city, images, annotations = root / "cityscapes", [], []
    stems = ["frankfurt_000000_000294", "frankfurt_000001_064925", "lindau_000000_000019", "bad-honnef_000000_000000"]
    for index, (stem, size) in enumerate(zip(stems, SIZES)):
        town = stem.split("_")[0]
        write_image(city / "leftImg8bit" / split / town / f"{stem}_leftImg8bit.png", size, index)
        thing, stuff, crowd = (label.dataset_id for label in classes)
        ids = quarters(*size, (thing * 1000 + index, stuff, crowd), 0)  # a thing without a number is a crowd
        write_ids(city / "gtFine" / f"cityscapes_panoptic_{split}" / f"{stem}_gtFine_panoptic.png", ids)
        truth = city / "gtFine" / split / town
        write_labels(truth / f"{stem}_gtFine_instanceIds.png", ids.astype(np.uint16))
        write_labels(truth / f"{stem}_gtFine_labelIds.png", quarters(*size, (thing, stuff, crowd), 0, np.uint8))
        train_ids = quarters(*size, (CITY_TRAIN_IDS[label] for label in (thing, stuff, crowd)), 255, np.uint8)
        write_labels(truth / f"{stem}_gtFine_labelTrainIds.png", train_ids)
        Image.new("RGBA", size[::-1], (70, 70, 70, 255)).save(truth / f"{stem}_gtFine_color.png")
        write_json(truth / f"{stem}_gtFine_polygons.json", {"imgHeight": size[0], "imgWidth": size[1], "objects": []})
        segments = segments_of(ids, {thing * 1000 + index: thing, stuff: stuff, crowd: crowd}, crowds=(crowd,))
        file_name = f"{stem}_gtFine_panoptic.png"
        annotations.append({"image_id": stem, "file_name": file_name, "segments_info": segments})
        image = {"id": stem, "width": size[1], "height": size[0], "file_name": f"{stem}_gtFine_leftImg8bit.png"}
        images.append(image)
    content = {"images": images, "annotations": annotations, "categories": categories_of("cityscapes")}
    write_json(city / "gtFine" / f"cityscapes_panoptic_{split}.json", content)


def _mapillary_vistas(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    folder, images, annotations = root / "mapillary_vistas" / LONG[split], [], []
    stems = ["_1Gn_xkw7sa_i9GU4mkxxQ", "-0TjJIHaWVoJNFTkvWkXQA", "00qclUcInksIYnm19b1Xfw", "__CRyFzoDOXn6unQ6a3DnQ"]
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    for index, (stem, size) in enumerate(zip(stems, SIZES)):
        write_image(folder / "images" / f"{stem}.jpg", size, index)
        ids = quarters(*size, (11, 5_000_000 + index, 300), 0)
        write_ids(folder / "panoptic" / f"{stem}.png", ids)
        labels = Image.fromarray(quarters(*size, (label.contiguous for label in classes), 65, np.uint8))
        labels.putpalette(palette.ravel().tolist())  # makes the numbers of a grey image indices
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        labels.save(folder / "labels" / f"{stem}.png")
        instances = quarters(*size, (label.contiguous * 256 for label in classes), 65 * 256, np.uint16)
        write_labels(folder / "instances" / f"{stem}.png", instances)
        categories = {int(ids[0, 0]): classes[0], int(ids[0, -1]): classes[1], int(ids[-1, 0]): classes[2]}
        segments = segments_of(ids, {segment_id: label.dataset_id for segment_id, label in categories.items()})
        annotations.append({"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments})
        images.append({"id": stem, "file_name": f"{stem}.jpg", "width": size[1], "height": size[0]})
    content = {"images": images, "annotations": annotations, "categories": categories_of("mapillary_vistas")}
    write_json(folder / "panoptic" / "panoptic_2018.json", content)


def _bdd100k_panoptic(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    """As BDD100K's own converter writes it: numbers for images, flags that are true or false."""
    folder, images, annotations = root / "bdd100k/labels/pan_seg", [], []
    for index, size in enumerate(SIZES):
        stem = _bdd_stem(index, split)
        write_image(root / "bdd100k/images/10k" / split / f"{stem}.jpg", size, index)
        ids = quarters(*size, (31 + index, classes[1].dataset_id, 300), 0)
        write_ids(folder / "coco_pano" / split / f"{stem}.png", ids)
        categories = {31 + index: classes[0], classes[1].dataset_id: classes[1], 300: classes[2]}
        segments = segments_of(ids, {segment_id: label.dataset_id for segment_id, label in categories.items()}, (300,))
        segments = [{**entry, "iscrowd": bool(entry["iscrowd"]), "ignore": 0} for entry in segments]
        annotations.append({"image_id": index + 1, "file_name": f"{stem}.png", "segments_info": segments})
        images.append({"id": index + 1, "file_name": f"{stem}.jpg", "width": size[1], "height": size[0]})
    content = {"images": images, "annotations": annotations, "categories": categories_of("bdd100k_40")}
    write_json(folder / "meta" / f"coco_{split}.json", content)


# ---- instances ----


def _coco_instances(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    """With a fifth image that nobody has labelled."""
    _write_coco_instances(root, split, (*SIZES, (32, 32)), dict(enumerate(classes, start=1)))


def _write_coco_instances(root: Path, split: str, sizes: Sequence[tuple[int, int]], classes: dict[int, Label]) -> None:
    """Polygons, and a crowd in the third quarter as a run-length code with a list of counts."""
    coco, images, annotations = root / "coco", [], []
    for index, size in enumerate(sizes):
        stem = f"{139 + 146 * index:012d}"
        write_image(coco / f"{split}2017" / f"{stem}.jpg", size, index)
        images.append({"license": 2, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1], "id": int(stem)})
        if index < len(SIZES):
            annotations += _instances(size, classes, int(stem), first_id=900_000_000_000 + 10 * index, crowd=True)
    images.reverse()  # the file does not keep them in order
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    content["categories"] = categories_of("coco_panoptic", things_only=True)
    write_json(coco / "annotations" / f"instances_{split}2017.json", content)


def _lvis(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    images, annotations, quarter = [], [], dict(enumerate(classes, start=1))
    for index, size in enumerate(SIZES):
        folder = ("val2017", "train2017")[index % 2]  # LVIS mixes both
        stem = f"{139 + 146 * index:012d}"
        write_image(root / "coco" / folder / f"{stem}.jpg", size, index)
        url = f"http://images.cocodataset.org/{folder}/{stem}.jpg"
        image = {"id": int(stem), "coco_url": url, "height": size[0], "width": size[1], "license": 1}
        images.append({**image, "not_exhaustive_category_ids": [7], "neg_category_ids": [2, 3]})
        annotations += _instances(size, quarter, int(stem), first_id=1 + 10 * index, crowd=False)
    names = {1: "aerosol_can", 7: "bow_(weapon)", 1203: "zucchini"}
    synonyms = {1: ["aerosol_can", "spray_can"], 1203: ["zucchini", "courgette"]}
    categories = [
        {
            "id": number,
            "name": names.get(number, f"class_{number}"),
            "synonyms": synonyms.get(number, [names.get(number, f"class_{number}")]),
            "synset": f"thing.n.{number:02d}",
            "def": 'said to hold "categories": [things]',
            "image_count": 4,
            "instance_count": 4,
            "frequency": "r",
        }
        for number in range(1, 1204)
    ]
    content = {"info": {}, "annotations": annotations, "images": images, "licenses": [], "categories": categories}
    write_json(root / "lvis" / f"lvis_v1_{split}.json", content)


def _instances(
    size: tuple[int, int], classes: dict[int, Label], image_id: int, *, first_id: int, crowd: bool
) -> list[dict]:
    """Annotations of the quarters (1 to 3) that `classes` names; with `crowd` the third is one."""
    numbers, annotations = quarters(*size, (1, 2, 3), 0), []
    for number, label in classes.items():
        mask = numbers == number
        polygon, box = rectangle(mask)
        annotation = {"segmentation": [polygon], "area": int(mask.sum()), "bbox": box, "category_id": label.dataset_id}
        annotation |= {"image_id": image_id, "id": first_id + number}
        if crowd:
            annotation["iscrowd"] = int(number == 3)
            if number == 3:
                annotation["segmentation"] = {"size": list(size), "counts": counts_of(mask)}
        annotations.append(annotation)
    return annotations


def counts_of(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask, column after column, beginning with a run of zeros."""
    flat = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat]).astype(np.int8)))
    return np.diff(np.concatenate([[0], changes, [len(flat)]])).tolist()


def _ade20k_instances(root: Path, split: str, classes: tuple[Label, ...]) -> None:
    _write_ade20k_instances(root, split, dict(enumerate(classes, start=1)))


def _write_ade20k_instances(root: Path, split: str, classes: dict[int, Label]) -> None:
    """Run-length codes with text for counts."""
    ade, images, annotations = root / "ADEChallengeData2016", [], []
    for index, size in enumerate(SIZES):
        stem = f"ADE_{split}_{index + 1:08d}"
        write_image(ade / "images" / LONG[split] / f"{stem}.jpg", size, index)
        images.append({"id": stem, "file_name": f"{stem}.jpg", "width": size[1], "height": size[0]})
        numbers = quarters(*size, (1, 2, 3), 0)
        for number, label in classes.items():
            mask = numbers == number
            code = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotation = {"id": len(annotations) + 1, "image_id": stem, "iscrowd": 0, "category_id": label.dataset_id}
            annotation["bbox"] = [int(value) for value in rectangle(mask)[1]]
            annotation["segmentation"] = {"size": list(size), "counts": code["counts"].decode()}
            annotations.append({**annotation, "area": int(mask.sum())})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": categories_of("ade20k_150", things_only=True),
    }
    write_json(ade / f"ade20k_instance_{split}.json", content)


# ---- semantic ----


def _coco_stem(index: int, split: str) -> str:
    return f"{139 + 146 * index:012d}"


def _ade_stem(index: int, split: str) -> str:
    return f"ADE_{split}_{index + 1:08d}"


def _voc_stem(index: int, split: str) -> str:
    return f"{2007 + index}_{33 + 1000 * index:06d}"


def _bdd_stem(index: int, split: str) -> str:
    return f"7d06fefd-f7be{index:04x}"


def _semantic(
    root: Path,
    split: str,
    classes: tuple[Label, ...],
    *,
    stem: Callable[[int, str], str],
    images: str,
    labels: str,
    folders: Mapping[str, str] = LONG,
    ending: str = "png",
    ignore: int = 255,
) -> None:
    """Label maps of 16 bit where they are tif, else of 8; `folders` are those of the splits in both places."""
    for index, size in enumerate(SIZES):
        write_image(root / images / folders[split] / f"{stem(index, split)}.jpg", size, index)
        dtype = np.uint16 if ending == "tif" else np.uint8
        truth = quarters(*size, (label.contiguous for label in classes), ignore, dtype)
        write_labels(root / labels / folders[split] / f"{stem(index, split)}.{ending}", truth)


_stuff = {"train": "train2017", "test": "val2017"}
_ade = {"stem": _ade_stem, "images": "ADEChallengeData2016/images"}
_full = {"stem": _ade_stem, "images": "ADE20K_2021_17_01/images_detectron2", "ending": "tif", "ignore": 65535}
_context = {"stem": _voc_stem, "images": "pascal_ctx_d2/images"}
_voc = {"stem": _voc_stem, "images": "pascal_voc_d2/images"}
WRITERS: dict[str, Callable[[Path, str, tuple[Label, ...]], None]] = {
    "openvocab_coco_2017_{}_panoptic_with_sem_seg": _coco_panoptic,
    "openvocab_coco_2017_{}_panoptic": _coco_panoptic,
    "openvocab_coco_2017_{}": _coco_instances,
    "openvocab_coco_2017_{}_stuff_sem_seg": partial(
        _semantic, stem=_coco_stem, images="coco", labels="coco/stuffthingmaps_detectron2", folders=_stuff
    ),
    "openvocab_lvis_v1_{}": _lvis,
    "openvocab_ade20k_panoptic_{}": _ade20k_panoptic,
    "openvocab_ade20k_instance_{}": _ade20k_instances,
    "openvocab_ade20k_sem_seg_{}": partial(_semantic, labels="ADEChallengeData2016/annotations_detectron2", **_ade),
    "openvocab_cityscapes_fine_panoptic_{}": _cityscapes,
    "openvocab_mapillary_vistas_panoptic_{}": _mapillary_vistas,
    "bdd10k_40_panoptic_{}": _bdd100k_panoptic,
    "bdd10k_{}_sem_seg": partial(
        _semantic,
        stem=_bdd_stem,
        images="bdd100k/images/10k",
        labels="bdd100k/labels/sem_seg/masks",
        folders={"train": "train", "val": "val"},
    ),
    "openvocab_ade20k_full_sem_seg_{}": partial(_semantic, labels="ADE20K_2021_17_01/annotations_detectron2", **_full),
    "openvocab_pascal_ctx59_sem_seg_{}": partial(_semantic, labels="pascal_ctx_d2/annotations_ctx59", **_context),
    "openvocab_pascal_ctx459_sem_seg_{}": partial(
        _semantic, labels="pascal_ctx_d2/annotations_ctx459", **_context, ending="tif", ignore=65535
    ),
    "openvocab_pascal20_sem_seg_{}": partial(_semantic, labels="pascal_voc_d2/annotations_pascal20", **_voc),
    "openvocab_pascal21_sem_seg_{}": partial(_semantic, labels="pascal_voc_d2/annotations_pascal21", **_voc),
}
