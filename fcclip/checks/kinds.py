"""What can be wrong with the files of a data set: every kind of issue, how bad it is and what to do about it.

error    training or evaluation stops at it, or learns from and measures with wrong labels
warning  they run, but probably not as meant
note     good to know
"""

from __future__ import annotations

from fcclip.data.annotations import ERROR, NOTE, WARNING, Kind
from fcclip.data.annotations import KINDS as ANNOTATION_KINDS

OK = "ok"
PUBLISHED_SO = "nothing: so it was published, and so it counts"  # remedy of what published files are known for
_AGAIN = "copy or download them again"
_RESTORE = "restore them, or prepare them again"
_TOGETHER = "prepare PNGs and JSON again, together"
_UNMEANT = "nothing, if that is meant"


# kind -> title, remedy; in the order in which they are shown
_ERRORS = {
    # annotation files
    "annotation-file": ("annotation files that cannot be used", "copy or prepare the file again"),
    "missing-folder": ("folders that do not exist",
        "check $DETECTRON2_DATASETS or the paths of the YAML; datasets/README.md shows the layout"),
    "no-images": ("no image with labels at all", "check folders, file names and endings"),
    "categories": ("lists of categories that contradict themselves", "number and name each once"),
    "vocabulary": ("the vocabulary cannot be used", "correct the vocabulary file"),
    "nothing-labelled": ("no image has a label", "check annotations, classes and ignore label"),
    # images
    "missing-image": ("images that do not exist", "restore them, or check the root folder"),
    "unreadable-image": ("images that cannot be read", _AGAIN),
    "image-size": ("images of another size than their annotation says; the loader refuses them",
        "use the images that were annotated"),
    "turned": ("images that their EXIF orientation turns away from their labels; the loader refuses them",
        "turn the pixels as the labels are and remove the EXIF orientation"),
    # labels
    "missing-ids": ("id PNGs that do not exist", _RESTORE),
    "missing-labels": ("label maps that do not exist", _RESTORE),
    "unreadable-labels": ("label files that cannot be read",
        "copy or prepare them again; a label map is grey of 8 or 16 bits, or palette indices"),
    "lossy-labels": ("labels in a lossy format, which changes them", "make them again as PNG"),
    "label-size": ("labels of another size than their image; the loader refuses them", "prepare them again for it"),
    "unknown-id": ("ids in PNGs that are not in the JSON; the loader refuses them", _TOGETHER),
    "unknown-label": ("values of label maps that are neither a class nor the ignore label",
        "prepare the label maps again"),
    # the check itself
    "process-died": ("files at which a process that reads them died",
        "open it with another program; with fewer --workers, if memory ran out"),
    "checker": ("files at which the check failed", "this is a mistake of fcclip; please report it"),
}  # fmt: skip
_WARNINGS = {
    "unknown-size": ("images that 'images' does not list: their size is read from the file", "list them"),
    "no-annotation": ("images without an annotation: they are left out", "annotate or remove them"),
    "no-instances-file": ("no instance annotations, so average precision cannot be measured",
        "get the file, or set MODEL.MASK_FORMER.TEST.INSTANCE_ON False"),
    "other-images": ("instance and panoptic annotations of different images",
        "use files of the same release and split"),
    "other-categories": ("most categories have another name than the class of their id",
        "check that the file belongs to this data set; classes go by id"),
    "similar-names": ("classes of nearly the same name (but for case, spaces, punctuation)",
        "rename one, or merge them"),
    "almost-seen": ("unseen classes with nearly the name of a training class (but for case, spaces, punctuation)",
        "spell them alike"),
    "count": ("not as many images as published",
        "for a subset that is meant; results on it are not comparable with published ones"),
    "without-labels": ("images without a label map of their name: they are left out", "add or rename them"),
    "without-image": ("label maps without an image of their name: they are left out", "add or rename them"),
    "turned-unclear": ("images that the loader turns by their EXIF orientation; sizes cannot tell how labels lie",
        "look at them with --preview; labels must lie as on the upright image"),
    "no-label-maps": ("no semantic label maps: training and panoptic quality do not need them, mIoU does",
        "prepare them, as datasets/README.md says"),
    "missing-instance-ids": ("missing files of instance ids, which AP, IoU and iIoU of Cityscapes need",
        "copy all of gtFine, or switch off MODEL.MASK_FORMER.TEST.INSTANCE_ON and SEMANTIC_ON"),
    "empty-segment": ("segments of the JSON without a pixel in the PNG", _TOGETHER),
    "area": ("areas in the JSON that are not the pixels of the mask", _TOGETHER),
    "labels-disagree": ("label maps and id PNGs that give different classes",
        "make the label maps again from the PNGs"),
}  # fmt: skip
_NOTES = {
    "shared-synonym": ("names that several classes have: CLIP cannot tell them apart", "more specific names"),
    "unused-class": ("classes without a single pixel or instance", "metrics leave them out"),
    "unlisted-file": ("images that no annotation lists: they are not used", _UNMEANT),
    "empty": ("images without a labelled pixel or instance", _UNMEANT),
}  # fmt: skip
KINDS: dict[str, Kind] = ANNOTATION_KINDS | {
    kind: Kind(level, *entry)
    for level, table in ((ERROR, _ERRORS), (WARNING, _WARNINGS), (NOTE, _NOTES))
    for kind, entry in table.items()
}
