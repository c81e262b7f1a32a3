"""The built-in label sets."""

import collections
import hashlib
import json
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer

import fcclip.vocabulary
from fcclip.vocabulary import TEMPLATES, Vocabulary

NAMES = Path(fcclip.vocabulary.__file__).parent / "names"
COUNTS = {  # name: (classes, things)
    "ade20k_150": (150, 100),
    "ade20k_847": (847, 0),
    "bdd100k_19": (19, 8),
    "bdd100k_40": (40, 10),
    "cityscapes": (19, 8),
    "coco_20i": (80, 0),
    "coco_20i_readable": (80, 0),
    "coco_panoptic": (133, 80),
    "coco_stuff_171": (171, 0),
    "mapillary_vistas": (65, 37),
    "pascal_5i": (20, 0),
    "pascal_5i_readable": (20, 0),
    "pascal_context_59": (59, 0),
    "pascal_context_459": (459, 0),
    "pascal_voc_20": (20, 0),
    "pascal_voc_21": (21, 0),
    "shapes": (60, 48),
    "shapes_seen": (40, 32),
}
# SHA-256 of the (id, name, thing) rows: the words may become better, these belong to the data set.
LABELS = {
    "ade20k_150": "0df97c917dc71a72",
    "ade20k_847": "64e5ee5711c0df11",
    "bdd100k_19": "1d7c30c50b0092f2",
    "bdd100k_40": "151f27cab7687fca",
    "cityscapes": "0c83d240ce1509c0",
    "coco_20i": "c7df2db12bc878bc",
    "coco_20i_readable": "dbad25ce9c237522",
    "coco_panoptic": "e3dd780e14ea35d1",
    "coco_stuff_171": "0d4a5be9276bc553",
    "mapillary_vistas": "904ca6f78161d6c9",
    "pascal_5i": "f0464d5f7e965baf",
    "pascal_5i_readable": "b2a18c0dafc28fcb",
    "pascal_context_59": "ee79836a3baf0a61",
    "pascal_context_459": "77856279edc5caa3",
    "pascal_voc_20": "f0464d5f7e965baf",
    "pascal_voc_21": "7025bce898adac2b",
    "shapes": "e114def80e877ae2",
    "shapes_seen": "38bab747725e1c64",
}
# What the annotators of COCO panoptic painted, under whichever name: (vocabulary, class, COCO class with its word).
SEEN = [
    ("ade20k_150", "person", "person"),
    ("ade20k_150", "window", "window-other"),
    ("ade20k_150", "sofa", "couch"),
    ("ade20k_150", "sidewalk", "pavement-merged"),
    ("ade20k_150", "hill", "mountain-merged"),
    ("ade20k_150", "cushion", "pillow"),
    ("ade20k_150", "minibike", "motorcycle"),
    ("ade20k_847", "windowpane", "window-other"),
    ("ade20k_847", "television receiver", "tv"),
    ("ade20k_847", "forest", "tree-merged"),
    ("bdd100k_19", "road", "road"),
    ("cityscapes", "vegetation", "tree-merged"),
    ("cityscapes", "terrain", "grass-merged"),
    ("mapillary_vistas", "Ground Animal", "cow"),
    ("mapillary_vistas", "Rail Track", "railroad"),
    ("pascal_context_59", "aeroplane", "airplane"),
    ("pascal_context_59", "ground", "dirt-merged"),
    ("pascal_context_459", "window blinds", "window-blind"),
    ("pascal_context_459", "cushion", "pillow"),
    ("pascal_voc_20", "tvmonitor", "tv"),
    ("pascal_voc_20", "diningtable", "dining table"),
    ("coco_stuff_171", "floor-stone", "pavement-merged"),
    ("coco_stuff_171", "straw", "grass-merged"),
]
UNSEEN = [  # what COCO panoptic leaves out, or knows only a small part of
    ("ade20k_150", "column"),
    ("ade20k_150", "sculpture"),
    ("ade20k_847", "coffin"),
    ("ade20k_847", "straw"),
    ("bdd100k_40", "lane divider"),
    ("cityscapes", "pole"),
    ("cityscapes", "rider"),
    ("mapillary_vistas", "Curb"),
    ("mapillary_vistas", "Traffic Sign (Front)"),
    ("pascal_context_59", "cloth"),
    ("pascal_context_459", "straw"),  # the one to drink with
    ("pascal_context_459", "glove"),  # COCO has only those of baseball
]


def test_the_list_here_is_complete():
    assert {path.stem for path in NAMES.glob("*.json")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_data_set(name):
    vocabulary = Vocabulary.builtin(name)
    assert (len(vocabulary), len(vocabulary.thing_classes)) == COUNTS[name]
    assert vocabulary.name == name


@pytest.mark.parametrize("name", COUNTS)
def test_every_entry_is_clean(name):
    entries = json.loads((NAMES / f"{name}.json").read_text(encoding="utf-8"))["classes"]
    ids = [entry["id"] for entry in entries]
    assert len(set(ids)) == len(ids)
    assert not {"invalid_class_id", "unlabeled", "void"} & {entry["name"].lower() for entry in entries}
    for entry in entries:
        words = [entry["name"], *entry["synonyms"]]
        assert len(set(words)) == len(words), entry
        assert all(word and word == word.strip() and not set(",;:") & set(word) for word in words), entry
        assert isinstance(entry["thing"], bool)


@pytest.mark.parametrize("name", COUNTS)
def test_ids_names_and_things_are_those_of_the_data_set(name):
    rows = [[entry.id, entry.name, entry.thing] for entry in Vocabulary.builtin(name).classes]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == LABELS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_every_class_has_words_and_they_are_plain_lower_case(name):
    for entry in Vocabulary.builtin(name).classes:
        assert entry.synonyms and len(set(entry.synonyms)) == len(entry.synonyms), entry
        for word in entry.synonyms:
            assert word.isascii() and word == " ".join(word.lower().split()), entry


@pytest.mark.parametrize("name", COUNTS)
def test_no_word_stands_for_two_classes(name):
    classes = Vocabulary.builtin(name).classes
    owners = collections.Counter(word for entry in classes for word in entry.synonyms)
    assert not [word for word, count in owners.items() if count > 1]
    names = {entry.name for entry in classes}
    for entry in classes:
        assert not names.intersection(entry.synonyms) - {entry.name}, entry


def test_a_label_that_is_no_english_is_not_asked_for():
    labels = [
        *("window-other", "door-stuff", "playingfield"),
        *("Crosswalk - Plain", "Traffic Sign (Back)", "On Rails"),
        *("diningtable", "tvmonitor"),
    ]
    entries = {
        entry.name: entry
        for name in ("coco_panoptic", "mapillary_vistas", "pascal_voc_20")
        for entry in Vocabulary.builtin(name).classes
    }
    for label in labels:
        assert label not in entries[label].synonyms
    assert entries["window-other"].synonyms[0] == "window"
    assert entries["Traffic Sign (Front)"].synonyms[0] == "traffic sign"
    for name in COUNTS:
        for entry in Vocabulary.builtin(name).classes:
            for word in entry.synonyms:
                assert not any(mark in word for mark in ("-merged", "-other", "-stuff", " - ", "(", "_")), entry


def test_classes_with_one_label_have_words_of_their_own():
    bags = [entry for entry in Vocabulary.builtin("ade20k_847").classes if entry.name == "bag"]
    assert [entry.id for entry in bags] == [114, 191, 252]
    assert [entry.synonyms[0] for entry in bags] == ["bag", "suitcase", "handbag"]


@pytest.mark.parametrize(("name", "label", "coco_label"), SEEN)
def test_what_coco_painted_is_seen(name, label, coco_label):
    words = {word for entry in Vocabulary.builtin(name).classes if entry.name == label for word in entry.synonyms}
    (known,) = (entry for entry in Vocabulary.builtin("coco_panoptic").classes if entry.name == coco_label)
    assert words.intersection(known.synonyms)


@pytest.mark.parametrize(("name", "label"), UNSEEN)
def test_what_coco_left_out_is_unseen(name, label):
    vocabulary = Vocabulary.builtin(name)
    seen = vocabulary.seen_by(Vocabulary.builtin("coco_panoptic"))
    assert not seen[vocabulary.class_names.index(label)]


def test_coco_stuff_is_seen_except_for_the_twelve_classes_that_coco_panoptic_drops():
    vocabulary = Vocabulary.builtin("coco_stuff_171")
    seen = vocabulary.seen_by(Vocabulary.builtin("coco_panoptic")).tolist()
    assert [label for label, known in zip(vocabulary.class_names, seen) if not known] == [
        *("cloth", "clothes", "furniture-other", "ground-other", "metal", "plant-other", "plastic", "solid-other"),
        *("structural-other", "textile-other", "waterdrops", "wood"),
    ]


def test_the_things_of_coco_have_the_same_words_in_both_vocabularies():
    panoptic, stuff = Vocabulary.builtin("coco_panoptic"), Vocabulary.builtin("coco_stuff_171")
    assert panoptic.synonyms[:80] == stuff.synonyms[:80]


def test_every_prompt_fits_into_the_text_tower():
    tokenizer = SimpleTokenizer()
    longest = max(TEMPLATES, key=lambda template: len(tokenizer.encode(template)))
    words = {word for name in COUNTS for synonyms in Vocabulary.builtin(name).synonyms for word in synonyms}
    assert max(len(tokenizer.encode(longest.format(word))) for word in words) + 2 <= 77  # start and end


def test_ids_are_the_data_sets_own():
    assert [entry.id for entry in Vocabulary.builtin("coco_panoptic").classes][78:82] == [89, 90, 92, 93]
    assert [entry.id for entry in Vocabulary.builtin("cityscapes").classes][:3] == [7, 8, 11]
    cityscapes = json.loads((NAMES / "cityscapes.json").read_text(encoding="utf-8"))
    assert [entry["train_id"] for entry in cityscapes["classes"]] == list(range(19))


def test_voc_20_is_voc_21_without_background():
    with_background, without = Vocabulary.builtin("pascal_voc_21"), Vocabulary.builtin("pascal_voc_20")
    assert with_background.class_names[0] == "background"
    assert with_background.classes[1:] == without.classes
