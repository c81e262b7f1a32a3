"""Writes data sets of four tiny images, two a split, as they come from their sites: layout, names, modes, formats.

Every function takes the folder of all data sets. Images are 4 x 6 or 6 x 4 pixels (height x width); what is in them
is written out here, so that tests can say by hand what comes of it.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image
from pycocotools import mask as coco_mask

from fcclip.vocabulary import Vocabulary

SPLITS = ("train", "val")
FOLDERS = {"train": "training", "val": "validation"}
WIDE, TALL = (4, 6), (6, 4)


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> None:
    """An image in the format of its ending; `palette`: (R, G, B) after (R, G, B), which makes it one of indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)
        assert image.mode == "P"
    image.save(path)


def save_photo(path: Path, size: tuple[int, int], seed: int) -> None:
    save(path, np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def save_json(path: Path, content: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding=encoding)


def halves(size: tuple[int, int], top: int, bottom: int, dtype: type = np.uint8) -> np.ndarray:
    """The upper half of one value, the lower of another."""
    values = np.full(size, top, dtype)
    values[size[0] // 2 :] = bottom
    return values


def colours(id_map: np.ndarray) -> np.ndarray:
    return np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536], -1).astype(np.uint8)


def segment(id_map: np.ndarray, segment_id: int, category: int, crowd: int = 0) -> dict[str, Any]:
    rows, columns = np.nonzero(id_map == segment_id)
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    return {
        "id": segment_id,
        "category_id": category,
        "area": len(rows),
        "bbox": [int(number) for number in box],
        "iscrowd": crowd,
    }


# ---- COCO ----


def coco(root: Path) -> None:
    """COCO 2017: images, panoptic PNGs and JSON files.

    The first image of a split: a crowd of persons (1) above, rug (200) below, void in the last column; the second:
    sky (187) above, dog (18) below.
    """
    folder = root / "coco"
    for split, first in (("train", 9), ("val", 139)):
        images, panoptic = [], []
        for index, size in enumerate((WIDE, TALL)):
            image_id, stem = first + 5 * index, f"{first + 5 * index:012d}"
            save_photo(folder / f"{split}2017" / f"{stem}.jpg", size, seed=image_id)
            id_map = halves(size, 3226956, 70, np.int32)
            if index == 0:
                id_map[:, -1] = 0
                segments = [segment(id_map, 70, 200), segment(id_map, 3226956, 1, crowd=1)]
            else:
                segments = [segment(id_map, 3226956, 187), segment(id_map, 70, 18)]
            save(folder / f"panoptic_{split}2017" / f"{stem}.png", colours(id_map))
            images.append(
                {"id": image_id, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1], "license": 3}
            )
            panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
        categories = [
            {"id": entry.id, "name": entry.name, "supercategory": "any", "isthing": int(entry.thing)}
            for entry in Vocabulary.builtin("coco_panoptic").classes
        ]
        content = {"info": {"year": 2018}, "images": images, "annotations": panoptic, "categories": categories}
        save_json(folder / "annotations" / f"panoptic_{split}2017.json", content)


def coco_stuff(root: Path) -> None:
    """COCO with the label maps of COCO-Stuff: person (id 1) above, wood (id 182) below, nothing in the first column; in
    the second image of a split stop sign (id 13) above and banner (id 92) below."""
    coco(root)
    for split, first in (("train", 9), ("val", 139)):
        folder = root / "coco" / "stuffthingmaps" / f"{split}2017"
        labels = halves(WIDE, 0, 181)
        labels[:, 0] = 255
        save(folder / f"{first:012d}.png", labels)
        save(folder / f"{first + 5:012d}.png", halves(TALL, 12, 91))


# ---- ADE20K ----


def ade20k(root: Path) -> None:
    """ADEChallengeData2016 with the instances of the Places Challenge.

    The first image of a split: road (7) above, skyscraper (49) below, and over them persons (thing 4) as instances 1
    and 3, each one pixel of the second column, in rows 0 and 2; the pixel below the first is a person without instance,
    the last column is other (0). The second: wall (1) above and, below it, a bed (thing 1, class 8) as instance 2.
    """
    folder = root / "ADEChallengeData2016"
    for split in SPLITS:
        for index, size in enumerate((WIDE, TALL)):
            stem = f"ADE_{split}_{index + 1:08d}"
            instances = np.zeros((*size, 3), np.uint8)
            if index == 0:
                classes = halves(size, 7, 49)
                instances[0, 1] = (4, 1, 0)
                instances[2, 1] = (4, 3, 0)
                classes[:3, 1] = 13
                classes[2, 1] = 49  # the label maps and the instances do not agree everywhere
                classes[:, -1] = 0
            else:
                classes = halves(size, 1, 8)
                instances[size[0] // 2 :] = (1, 2, 0)
            save_photo(folder / "images" / FOLDERS[split] / f"{stem}.jpg", size, seed=index)
            save(folder / "annotations" / FOLDERS[split] / f"{stem}.png", classes)
            save(folder / "annotations_instance" / FOLDERS[split] / f"{stem}.png", instances)


def ade20k_full(root: Path) -> None:
    """ADE20K_2021_17_01: wall (object 2978) above, sky (2420) below, and in the first column an object (6655) that is
    none of the 847 classes. The last image has 520 x 1041 pixels."""
    ade = "ADE20K_2021_17_01"
    index: dict[str, Any] = {"filename": [], "folder": []}
    for name, place, size in (
        ("ADE_train_00000001", "training/urban/street", WIDE),
        ("ADE_frame_00000370", "training/home_or_hotel/bedroom", TALL),
        ("ADE_val_00000001", "validation/urban/street", WIDE),
        ("ADE_val_00000002", "validation/nature_landscape/beach", (520, 1041)),
    ):
        folder = root / ade / "images" / "ADE" / place
        objects = halves(size, 2978, 2420, np.int32)
        objects[:, 0] = 6655
        numbers = np.zeros(size, np.int32)
        save_photo(folder / f"{name}.jpg", size, seed=3)
        save(folder / f"{name}_seg.png", np.stack([objects // 256 * 10, objects % 256, numbers], -1).astype(np.uint8))
        save(folder / f"{name}_parts_1.png", np.zeros((*size, 3), np.uint8))
        save(folder / name / f"instance_000_{name}.png", halves(size, 255, 0))
        save_json(folder / f"{name}.json", {"annotation": {"filename": f"{name}.jpg"}}, encoding="latin-1")
        index["filename"].append(f"{name}.jpg")
        index["folder"].append(f"{ade}/images/ADE/{place}")
    index |= {
        "scene": ["/street", "/bedroom", "/street", "/beach"],
        "objectnames": ["-"] * 3000,
        "objectPresence": np.zeros((3000, 4), np.int32),
        "proportionClassIsPart": np.zeros(3000),
        "description": {"folder": "where the image lies"},
    }
    (root / ade / "index_ade20k.pkl").write_bytes(pickle.dumps(index, protocol=4))


# ---- Cityscapes ----


def cityscapes(root: Path) -> None:
    """leftImg8bit and gtFine: road (7) above and, below it, car 0 (26000) with a group of cars (26) in the last column;
    the first column is ego vehicle (1). In the second image of a split sky (23) and a trailer (30001), which is not
    evaluated. Each city has a folder."""
    for split, cities in (("train", ("aachen", "zurich")), ("val", ("frankfurt", "munster"))):
        for index, (city, size) in enumerate(zip(cities, (WIDE, TALL))):
            name = f"{city}_{index:06d}_000294"
            truth = root / "cityscapes" / "gtFine" / split / city / f"{name}_gtFine"
            instances = halves(size, 7, 26000, np.uint16) if index == 0 else halves(size, 23, 30001, np.uint16)
            if index == 0:
                instances[2:, -1] = 26
                instances[:, 0] = 1
            labels = np.where(instances < 1000, instances, instances // 1000).astype(np.uint8)
            save(root / "cityscapes" / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", _photo(size))
            save(truth.with_name(f"{truth.name}_instanceIds.png"), instances)
            save(truth.with_name(f"{truth.name}_labelIds.png"), labels)


# ---- BDD100K ----


def bdd100k(root: Path) -> None:
    """Images and panoptic bitmasks: road (7) above and, below it, two cars (35), the second a crowd in the last column;
    the first column is nothing. In the second image of a split sky (30) and a truck (40) that is to be ignored."""
    for split in SPLITS:
        for index, size in enumerate((WIDE, TALL)):
            bitmask = np.zeros((*size, 4), np.uint8)
            bitmask[...] = (7, 0, 0, 7) if index == 0 else (30, 0, 0, 30)
            bitmask[size[0] // 2 :] = (35, 0, 1, 44) if index == 0 else (40, 0b1001, 0, 31)
            if index == 0:
                bitmask[2:, -1] = (35, 0b0010, 0, 32)
                bitmask[:, 0] = 0
            name = f"{split}-{index:08d}"
            save(root / "bdd100k/images/10k" / split / f"{name}.jpg", _photo(size))
            save(root / "bdd100k/labels/pan_seg/bitmasks" / split / f"{name}.png", bitmask)


def _photo(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)


# ---- Pascal ----


def voc_palette() -> list[int]:
    """The colours of VOC's label maps: three bits of the index give a bit of each channel, from the highest down."""
    table = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        channel, place = bit % 3, 7 - bit // 3
        table[:, channel] |= ((np.arange(256) >> bit & 1) << place).astype(np.uint8)
    return table.ravel().tolist()


def pascal_voc(root: Path) -> None:
    """VOC 2012: background (0) above, aeroplane (1) below, border (255) in the first column; in the second image of a
    split tvmonitor (20) and background."""
    folder = root / "VOCdevkit" / "VOC2012"
    for split, names in (("train", ("2007_000032", "2011_003276")), ("val", ("2007_000033", "2011_003271"))):
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))
        for index, (name, size) in enumerate(zip(names, (WIDE, TALL))):
            classes = halves(size, 0, 1) if index == 0 else halves(size, 20, 0)
            if index == 0:
                classes[:, 0] = 255
            save_photo(folder / "JPEGImages" / f"{name}.jpg", size, seed=7)
            save(folder / "SegmentationClass" / f"{name}.png", classes, palette=voc_palette())
            save(folder / "SegmentationObject" / f"{name}.png", np.minimum(classes, 1), palette=voc_palette())
    save_photo(folder / "JPEGImages" / "2012_000001.jpg", WIDE, seed=8)  # in no split


def pascal_context(root: Path) -> None:
    """VOC 2010 with trainval_merged.json and the .mat files.

    The first image of a split: aeroplane (category 2) everywhere, painted over below by sky (360) and in the last
    column by category 0; the second: wood (458) above, below nothing. In the .mat files the upper half is 1, the lower
    459, the last column 0.
    """
    folder = root / "VOCdevkit" / "VOC2010"
    images, annotations = [], []
    for split, names in (("train", ("2008_000008", "2010_006086")), ("val", ("2008_000002", "2010_006082"))):
        for index, (name, size) in enumerate(zip(names, (WIDE, TALL))):
            image_id = int(name.replace("_", ""))
            everywhere, below, last_column = np.ones(size, bool), halves(size, 0, 1) > 0, np.zeros(size, bool)
            last_column[:, -1] = True
            painted = [(2, everywhere), (360, below), (0, last_column)] if index == 0 else [(458, ~below)]
            for category, mask in painted:
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                code = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": code,
                }
                annotations.append({**annotation, "area": int(mask.sum()), "iscrowd": False, "parts": []})
            image = {"image_id": image_id, "file_name": f"{name}.jpg", "phase": split}
            images.append({**image, "height": size[0], "width": size[1], "date_captured": "31/12/2010"})
            save_photo(folder / "JPEGImages" / f"{name}.jpg", size, seed=9)
            labels = halves(size, 1, 459, np.uint16)
            labels[:, -1] = 0
            (folder / "trainval").mkdir(exist_ok=True)
            scipy.io.savemat(folder / "trainval" / f"{name}.mat", {"LabelMap": labels}, do_compression=True)
    images.append({"image_id": 2008000001, "file_name": "2008_000001.jpg", "phase": "test", "height": 4, "width": 6})
    content = {"info": {}, "images": images, "annos_segmentation": annotations, "annos_occlusion": []}
    save_json(folder / "trainval_merged.json", {**content, "annos_boundary": [], "categories": [], "parts": []})
