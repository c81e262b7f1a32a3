"""What can be wrong with a data set: every kind of finding, how bad it is and what to do about it.

error    training or evaluation stops at it, or learns from and measures with wrong labels
warning  they run, but probably not as meant
note     good to know
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "PUBLISHED_SO", "SEVERITIES", "Finding", "Findings", "Kind", "finding", "plural", "some"]

SEVERITIES = ("error", "warning", "note")
_AGAIN = "copy or download them again"
_TOGETHER = "prepare PNGs and JSON again, together"


@dataclass(frozen=True)
class Finding:
    """Something about one file.

    Args:
        severity: "error", "warning" or "note".
        file: the file, or what else it is about.
        what: what is wrong with it.
        remedy: what to do.
        kind: key of `KINDS`; findings of one kind are shown together.
    """

    severity: str
    file: str
    what: str
    remedy: str
    kind: str = ""


@dataclass(frozen=True)
class Kind:
    """What findings of one kind have in common.

    Args:
        severity: where a finding does not say otherwise.
        title: heading of such findings.
        remedy: where a finding does not say otherwise.
    """

    severity: str
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    # ---- annotation files ----
    "description": Kind("error", "descriptions of data sets that cannot be used", "correct the YAML"),
    "annotation-file": Kind("error", "annotation files that cannot be used", "copy or prepare the file again"),
    "missing-folder": Kind(
        "error",
        "folders that do not exist",
        "check the root folder ($DETECTRON2_DATASETS) or the paths of the YAML; datasets/README.md shows the layout",
    ),
    "no-images": Kind("error", "no image with labels at all", "check folders, file names and endings"),
    "broken-entry": Kind("error", "entries without what they need", "complete or remove them"),
    "duplicate-image-id": Kind("error", "image ids that stand for several images", "give each image its own id"),
    "duplicate-file": Kind("error", "files that are listed more than once", "list each file once"),
    "duplicate-annotation-id": Kind(
        "error", "annotation ids that are used more than once: the later hides the earlier", "number them again"
    ),
    "duplicate-segment-id": Kind(
        "error", "segments of one image with the same id, which cannot be told apart", "give each an id of its own"
    ),
    "void-id": Kind("error", "segment ids that no PNG can hold (1..16777215; 0 is unlabelled)", _TOGETHER),
    "unknown-category": Kind(
        "error",
        "categories that are no class of the data set",
        "check that the file belongs to this data set; leave out what has no class",
    ),
    "unlisted-image": Kind(
        "error", "annotations of images that are not in 'images'", "list the images, or leave the annotations out"
    ),
    "no-mask": Kind(
        "error", "instances without a segmentation: a box gives no mask", "draw the masks, or leave these instances out"
    ),
    "bad-polygon": Kind(
        "warning", "polygons without an area, which are left out", "remove them, or draw at least three corners"
    ),
    "bad-code": Kind("error", "run-length codes that do not fit their image", "encode the masks again"),
    "instance-of-stuff": Kind(
        "error", "instances of classes that are no things", "mark the classes as things, or leave the instances out"
    ),
    "size-not-told": Kind(
        "note", "images whose size the JSON does not give; it is read from their headers at each start", "add it"
    ),
    "no-annotation": Kind(
        "warning", "images in 'images' without an annotation: they are left out", "annotate or remove them"
    ),
    "no-instances-file": Kind(
        "warning",
        "no instance annotations, so average precision cannot be measured",
        "get the file, or set MODEL.MASK_FORMER.TEST.INSTANCE_ON False",
    ),
    "other-images": Kind(
        "warning", "instance and panoptic annotations of different images", "use files of the same release and split"
    ),
    # ---- classes ----
    "categories": Kind("error", "lists of categories that contradict themselves", "number and name each once"),
    "category-name": Kind("note", "categories with another name than the class of their id", "the id decides"),
    "other-categories": Kind(
        "warning",
        "most categories have another name than the class of their id",
        "check that the file belongs to this data set; classes go by id",
    ),
    "category-spelling": Kind(
        "warning",
        "categories whose name differs from the class by case, spaces or punctuation only",
        "spell them alike: words are compared letter by letter",
    ),
    "category-not-listed": Kind(
        "warning", "category ids that are used but not in the list 'categories'", "add them: other programs need it"
    ),
    "class-not-listed": Kind("note", "classes that 'categories' does not list", "nothing, if they are not annotated"),
    "isthing": Kind(
        "warning", "things of the JSON that are stuff here, or the reverse", "the vocabulary counts; make them agree"
    ),
    "vocabulary": Kind("error", "the words of the classes cannot be used", "put the vocabulary file right"),
    "same-name": Kind("warning", "classes with the same name", "rename one: tables cannot tell them apart"),
    "similar-names": Kind(
        "warning", "classes whose names differ by case, spaces or punctuation only", "rename one, or merge them"
    ),
    "shared-word": Kind("note", "words that several classes have: CLIP cannot tell them apart", "more specific words"),
    "almost-seen": Kind(
        "warning",
        "classes that count as unseen, though a training word differs by case, spaces or punctuation only",
        "spell them alike",
    ),
    "unused-class": Kind("note", "classes without a single pixel or instance", "metrics leave them out"),
    # ---- the set as a whole ----
    "count": Kind(
        "warning",
        "not as many images as published",
        "for a subset that is meant; results on it are not comparable with published ones",
    ),
    "nothing-labelled": Kind("error", "no image has a label", "check annotations, classes and ignore label"),
    "unlisted-file": Kind("note", "images that no annotation lists: they are not used", "nothing, if that is meant"),
    "unlisted-labels": Kind(
        "note", "label files that the annotations do not list: they are not used", "nothing, if that is meant"
    ),
    "without-labels": Kind(
        "warning", "images without a label map of their name: they are left out", "add or rename them"
    ),
    "without-image": Kind(
        "warning", "label maps without an image of their name: they are left out", "add or rename them"
    ),
    # ---- images ----
    "missing-image": Kind("error", "images that do not exist", "restore them, or check the root folder"),
    "unreadable-image": Kind("error", "images that cannot be read", _AGAIN),
    "cut-off": Kind(
        "warning", "files that do not end as their format does; probably cut off", "run without --fast, or copy again"
    ),
    "image-size": Kind(
        "error",
        "images of another size than their annotation says; the loader refuses them",
        "use the images that were annotated",
    ),
    "turned": Kind(
        "error",
        "images that are turned upright by their EXIF orientation, away from their labels; the loader refuses them",
        "turn the pixels as the labels are and remove the EXIF orientation",
    ),
    "turned-unclear": Kind(
        "warning",
        "images that the loader turns by their EXIF orientation, where sizes cannot tell how the labels lie",
        "look at them with --preview; labels must lie as on the upright image",
    ),
    "turned-right": Kind(
        "note", "images that the loader turns upright by their EXIF orientation, as their labels are", "nothing"
    ),
    "grey": Kind("note", "grey images: the loader gives them three equal channels", "nothing"),
    "cmyk": Kind(
        "warning",
        "CMYK images: the loader converts them without their colour profile, so colours may be off",
        "convert them to RGB with a colour-managed program",
    ),
    "deep": Kind(
        "warning",
        "images of 16 bits a channel: the loader takes the higher 8",
        "store 8 bits a channel, scaled so that they are neither dark nor flat",
    ),
    "alpha": Kind(
        "note", "images with an alpha channel: the loader drops it and takes the colours as stored", "nothing"
    ),
    "transparent": Kind(
        "warning",
        "images with transparent parts: the loader shows the colours that are stored under them",
        "blend them with a background and store RGB",
    ),
    # ---- labels ----
    "missing-ids": Kind("error", "id PNGs that do not exist", "restore them, or prepare them again"),
    "missing-labels": Kind("error", "label maps that do not exist", "restore them, or prepare them again"),
    "no-label-maps": Kind(
        "warning",
        "no semantic label maps: training and panoptic quality do not need them, mIoU does",
        "prepare them, as datasets/README.md says",
    ),
    "missing-instance-ids": Kind(
        "warning",
        "files of instance ids that do not exist: the Cityscapes protocol (AP, IoU, iIoU) cannot be followed without",
        "copy all of gtFine, or switch off MODEL.MASK_FORMER.TEST.INSTANCE_ON and SEMANTIC_ON; training and panoptic "
        "quality do not need them",
    ),
    "unreadable-labels": Kind("error", "label files that cannot be read", "copy or prepare them again"),
    "lossy-labels": Kind("error", "labels in a lossy format, which changes them", "make them again as PNG"),
    "coloured-labels": Kind(
        "error",
        "label maps that do not have one whole number a pixel",
        "convert colours to class ids: grey of 8 or 16 bits, or palette indices",
    ),
    "label-size": Kind(
        "error", "labels of another size than their image; the loader refuses them", "prepare them again for it"
    ),
    "unknown-id": Kind("error", "ids in PNGs that are not in the JSON; the loader refuses them", _TOGETHER),
    "empty-segment": Kind("warning", "segments of the JSON without a pixel in the PNG", _TOGETHER),
    "area": Kind("warning", "areas in the JSON that are not the pixels of the mask", _TOGETHER),
    "instance-area": Kind(
        "note", "areas in the JSON far from those of the masks: AP sorts by them into small, medium, large", "recount"
    ),
    "box": Kind(
        "warning",
        "boxes outside of the image, without a size, or around something else; [x, y, width, height] is expected",
        "compute them again from the masks",
    ),
    "box-of-segment": Kind(
        "note", "boxes of segments that do not bound their pixels; nothing here reads them", "nothing"
    ),
    "unknown-label": Kind(
        "error", "values of label maps that are neither a class nor the ignore label", "prepare the label maps again"
    ),
    "labels-disagree": Kind(
        "warning", "label maps and id PNGs that give different classes", "make the label maps again from the PNGs"
    ),
    "empty-mask": Kind("note", "instances whose mask has no pixel", "remove them"),
    "empty": Kind("note", "images without a labelled pixel or instance", "nothing, if that is meant"),
    "crowd-only": Kind(
        "note", "images with crowds only: nothing to learn, and instance training leaves them out", "nothing"
    ),
    # ---- the check itself ----
    "process-died": Kind(
        "error",
        "files at which the process that read them died",
        "open them with another program; with fewer --workers, if memory ran out",
    ),
    "checker": Kind("error", "files at which the checker failed", "this is no message of fcclip; please report it"),
}  # fmt: skip
PUBLISHED_SO = "nothing: so it was published, and so it counts"  # remedy of what published files are known for


class Findings(list[Finding]):
    """A list that findings are said to."""

    def say(self, kind: str, file: object, what: str, **changes: str) -> None:
        """Adds a finding of one of `KINDS`; `changes`: its `remedy` or `severity` where they differ from the kind's."""
        self.append(finding(kind, file, what, **changes))


def finding(kind: str, file: object, what: str, *, remedy: str | None = None, severity: str | None = None) -> Finding:
    """A finding of one of `KINDS`."""
    known = KINDS[kind]
    return Finding(severity or known.severity, str(file), what, known.remedy if remedy is None else remedy, kind)


def some(values: Sequence[Any], limit: int = 5) -> str:
    """The first of some values, and how many more there are."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def plural(count: int, word: str) -> str:
    """A number of things.

    Example:
        >>> plural(1200, "pixel"), plural(1, "pixel")
        ('1,200 pixels', '1 pixel')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"
