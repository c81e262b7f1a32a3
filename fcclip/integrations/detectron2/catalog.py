"""Data sets in detectron2's catalogs: fcclip's under their published names, and those of a YAML; the vocabulary of any
data set there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from fcclip.config import lookup, with_values
from fcclip.data import (
    DATASETS,
    Dataset,
    build_test_mapper,
    build_train_mapper,
    dataset_vocabulary,
    get_dataset,
    is_own_data,
    own_dataset,
)
from fcclip.errors import InputError
from fcclip.integrations.detectron2.records import instances_from_targets
from fcclip.vocabulary import ClassEntry, Vocabulary, plain_name

logger = logging.getLogger(__name__)


class DatasetMetadata(Metadata):
    """What a data set says about itself: one of fcclip's at each access, since its folders are below
    $DETECTRON2_DATASETS as it is then; that of a YAML (`_dataset`) as it was when it was registered."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_") or key in self._RENAMED:
            return super().__getattr__(key)
        known = self.dataset().metadata
        if key not in known:
            raise AttributeError(f"data set '{self.name}' has no '{key}' in its metadata. It has: {', '.join(known)}.")
        return known[key]

    def as_dict(self) -> dict[str, Any]:
        """Everything at once."""
        mine = {key: value for key, value in super().as_dict().items() if not key.startswith("_")}
        return {**self.dataset().metadata, **mine}

    def dataset(self) -> Dataset:
        """The data set."""
        return self.__dict__.get("_dataset") or get_dataset(self.name)


@dataclass(frozen=True)
class _Records:
    """Reads the records of a data set of fcclip when detectron2 asks for them; of a name, or of a YAML."""

    name: str

    def __call__(self) -> list[dict]:
        return get_dataset(self.name).records()


def register_datasets() -> None:
    """Puts every data set of fcclip into both catalogs; nothing of them is read.

    Raises:
        ValueError: the catalogs hold something else under one of the names.
    """
    for name in DATASETS:
        if _is_taken(name, _Records(name)):
            raise InputError(
                f"data set '{name}' is in detectron2's catalogs already, and is not fcclip's. Rename yours."
            )
        DatasetCatalog[name] = _Records(name)
        if not isinstance(MetadataCatalog.data.get(name), DatasetMetadata):
            MetadataCatalog[name] = DatasetMetadata(name=name)


def _is_taken(name: str, records: _Records) -> bool:
    """Whether the catalogs hold something under this name that does not come from these records."""
    metadata = MetadataCatalog.data.get(name)
    is_free = metadata is None or isinstance(metadata, DatasetMetadata) or set(metadata.as_dict()) <= {"name"}
    return DatasetCatalog.data.get(name, records) != records or not is_free


def register_own_data(path: str | Path) -> str:
    """Puts the data set that a YAML describes (GETTING_STARTED.md, "Your own data") into both catalogs.

    The YAML is read now, and again by a second call with the same path; images and labels are read when detectron2
    asks for records.

    Returns:
        Its name, the file's without the ending: for DATASETS.TRAIN and DATASETS.TEST of a config of detectron2.

    Raises:
        FileNotFoundError: no such YAML.
        ValueError: it does not describe a data set, or the catalogs hold something else under its name.
    """
    path = Path(path).expanduser().absolute()
    dataset, records = own_dataset(path), _Records(str(path))
    if _is_taken(dataset.name, records):
        raise InputError(
            f"data set '{dataset.name}' is in detectron2's catalogs already, and not by {path}. Rename the YAML: the "
            "name of a data set is that of its file."
        )
    # detectron2 calls an instance thing_classes[category_id]
    is_coco = dataset.metadata["evaluator_type"] == "coco"
    names = {"thing_classes": list(dataset.metadata["stuff_classes"])} if is_coco else {}
    DatasetCatalog[dataset.name] = records
    # one object, which reads its COCO JSON once
    MetadataCatalog[dataset.name] = DatasetMetadata(name=dataset.name, _dataset=dataset, **names)
    return dataset.name


def catalog_vocabulary(name: str, *, folder: str, need_things: bool = False) -> Vocabulary:
    """The vocabulary of a data set of detectron2's catalog; arguments as of `metadata_vocabulary`.

    Raises:
        ValueError: no data set of that name, and as `metadata_vocabulary`.
    """
    if is_own_data(name) and name not in MetadataCatalog.data:
        raise InputError(
            f"data set '{name}' is a YAML, which detectron2 does not know: call register_own_data('{name}') of "
            "fcclip.integrations.detectron2, and put the name that it returns into DATASETS"
        )
    metadata = lookup("data set (of detectron2's MetadataCatalog)", name, MetadataCatalog.data)
    return metadata_vocabulary(metadata, folder=folder, need_things=need_things)


def metadata_vocabulary(metadata: Metadata, *, folder: str = "", need_things: bool = False) -> Vocabulary:
    """The vocabulary of a data set of fcclip or of the user's own.

    Of metadata that are not fcclip's, `stuff_classes` are all classes, things too, in the order of their contiguous
    ids, or without it `thing_classes`; synonyms in an entry are separated by commas. Things are the values of
    `thing_dataset_id_to_contiguous_id`.

    Args:
        metadata: of detectron2's catalog.
        folder: of published vocabulary files (MODEL.FC_CLIP.VOCABULARIES), for the data sets of fcclip.
        need_things: a panoptic or instance output is wanted, for which things must be told from stuff.

    Raises:
        ValueError: no classes, no things where they are needed, or thing ids that are not classes.
    """
    if isinstance(metadata, DatasetMetadata):
        return dataset_vocabulary(metadata.dataset(), folder)
    where = f"metadata of data set '{metadata.name}'"
    if not _classes(metadata) and metadata.name in DatasetCatalog:
        DatasetCatalog.get(metadata.name)  # detectron2's COCO reader learns the classes when it reads the file
    names, things = _classes(metadata), metadata.get("thing_dataset_id_to_contiguous_id")
    if not names:
        raise InputError(
            f"the {where} have neither stuff_classes nor thing_classes, so there is nothing to look for. Set them: "
            f'MetadataCatalog.get("{metadata.name}").set(stuff_classes=["cat, kitty", "grass"], '
            "thing_dataset_id_to_contiguous_id={1: 0})"
        )
    if things is None and metadata.get("stuff_classes"):
        if need_things:
            raise InputError(
                f"the {where} do not say which of the stuff_classes are things. Set thing_dataset_id_to_contiguous_id "
                "(all classes stuff: {}), or turn MODEL.MASK_FORMER.TEST.PANOPTIC_ON and INSTANCE_ON off"
            )
        things = {}
    thing_classes = range(len(names)) if things is None else things.values()
    if max(thing_classes, default=0) >= len(names):
        raise InputError(
            f"the {where} have {len(names)} classes, but thing_dataset_id_to_contiguous_id goes up to "
            f"{max(thing_classes)}: stuff_classes must be all classes, things too, in the order of their contiguous ids"
        )
    try:
        synonyms = [tuple(filter(None, map(plain_name, name.split(",")))) for name in names]
        entries = tuple(ClassEntry(index, "".join(of_class[:1]), of_class) for index, of_class in enumerate(synonyms))
        vocabulary = Vocabulary(metadata.name, entries).with_things(thing_classes)
    except ValueError as error:
        raise InputError(f"the {where} cannot be read as class names: {error}") from error
    logger.info(
        "data set '%s': %d classes of its own metadata, %d of them things",
        *(metadata.name, len(vocabulary), len(vocabulary.thing_classes)),
    )
    return vocabulary


class DatasetMapper:
    """fcclip's mapper in detectron2's form: `build_detection_train_loader(cfg, mapper=DatasetMapper(cfg))`.

    A training sample has `image` (3, H, W) uint8, `instances` with gt_classes, gt_masks and gt_boxes, `height`,
    `width`, the names of the record, and `point_seed`, which fixes where its losses look; a test sample has no ground
    truth. Random numbers come from NumPy's global generator, which detectron2 seeds in each worker.

    Args:
        cfg: reads INPUT; INPUT.DATASET_MAPPER_NAME names the mapper for training. Label maps mean the classes of the
            first of DATASETS.TRAIN, and its ignore_label unlabelled pixels.
        is_train: augment and bring ground truth.

    Raises:
        ValueError: an unknown mapper, or values of INPUT that cannot work.
    """

    name = ""  # of the mapper; "": INPUT.DATASET_MAPPER_NAME

    def __init__(self, cfg: CfgNode, is_train: bool = True) -> None:
        if self.name:
            cfg = with_values(cfg, {"INPUT.DATASET_MAPPER_NAME": self.name})
        self.is_train = is_train
        self._map = build_train_mapper(cfg, _label_metadata(cfg)) if is_train else build_test_mapper(cfg)

    def __call__(self, record: dict) -> dict[str, Any]:
        """A record of the catalog -> a sample.

        Raises:
            FileNotFoundError, ValueError: a file that is missing or broken, or a record without the ground truth that
                the mapper reads.
        """
        if not self.is_train:
            return self._map(record)
        sample = self._map(record, np.random)
        sample["instances"] = instances_from_targets(sample.pop("targets"))
        return sample


class COCOInstanceNewBaselineDatasetMapper(DatasetMapper):
    """The published mapper of that name."""

    name = "coco_instance_lsj"


class COCOPanopticNewBaselineDatasetMapper(DatasetMapper):
    """The published mapper of that name."""

    name = "coco_panoptic_lsj"


class MaskFormerInstanceDatasetMapper(DatasetMapper):
    """The published mapper of that name."""

    name = "mask_former_instance"


class MaskFormerPanopticDatasetMapper(DatasetMapper):
    """The published mapper of that name."""

    name = "mask_former_panoptic"


class MaskFormerSemanticDatasetMapper(DatasetMapper):
    """The published mapper of that name."""

    name = "mask_former_semantic"


def _label_metadata(cfg: CfgNode) -> dict[str, Any]:
    """What the catalog says about the label maps of the first training set, as fcclip's mappers ask for it."""
    first = next(iter(cfg.DATASETS.TRAIN), None)
    metadata = MetadataCatalog.data.get(first)
    classes, ignore_label = (None, None) if metadata is None else (_classes(metadata), metadata.get("ignore_label"))
    return {} if classes is None or ignore_label is None else {"stuff_classes": classes, "ignore_label": ignore_label}


def _classes(metadata: Metadata) -> list[str] | None:
    return metadata.get("stuff_classes") or metadata.get("thing_classes")
