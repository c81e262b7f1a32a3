"""Measures `unknown` and `others` on the shapes world: what becomes of classes whose names are left out on purpose.

    python tools/measure_unknown.py --set shapes_val

Every class is left out in one of five turns. A labelled segment is what the panoptic map calls most of its pixels: by
its own name, by another (wrong), unknown, or nothing. Seen and unseen are classes that training knew and did not know.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fcclip import Segmenter
from fcclip.data import dataset_vocabulary, get_dataset, read_image
from fcclip.data.images import read_id_map
from fcclip.errors import run_program
from fcclip.modeling.unknown import UNKNOWN
from fcclip.segmenter import Naming
from fcclip.vocabulary import Vocabulary

TURNS = 5
ANSWERS = ("own name", "wrong name", "unknown", "nothing")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", default="shapes_val", help="of the shapes world (default: %(default)s; choose on shapes_tune)")
    add("--images", type=int, default=100, help="the first of them (default: %(default)s)")
    add("--void-thresholds", nargs="+", type=float, default=[1.0, 0.3], metavar="P", help="1: void decides nothing")
    return parser.parse_args(arguments)


def asked_names(whole: Vocabulary, turn: int) -> Vocabulary:
    """The classes that are asked for in a turn."""
    kept = [entry for index, entry in enumerate(whole.classes) if index % TURNS != turn]
    return Vocabulary(f"{whole.name} without {turn}", tuple(kept))


def answers(id_map: np.ndarray, truth: np.ndarray, names: dict[int, str], ids: dict[int, str]) -> list[tuple[str, str]]:
    """(true name, answer) of each labelled segment.

    Args:
        id_map, names: a panoptic map, and the class name of each of its ids.
        truth, ids: the labelled one, and those of its.
    """
    found = []
    for number, name in ids.items():
        inside = np.bincount(id_map[truth == number])
        if len(inside):
            answer = names.get(int(inside.argmax()), "")
            kinds = {name: ANSWERS[0], UNKNOWN: ANSWERS[2], "": ANSWERS[3]}
            found.append((name, kinds.get(answer, ANSWERS[1])))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    segmenter, dataset = Segmenter.from_pretrained("shapes"), get_dataset(args.set)
    whole, trained = dataset_vocabulary(dataset), segmenter.model.seen_vocabulary
    seen = dict(zip(whole.class_names, whole.seen_by(trained).tolist()))
    settings: dict[str, dict] = {"everything gets a name": {}}
    for name, others in (("training names", trained), ("all 60 names", whole)):
        for each in args.void_thresholds:
            settings[f"{name}, void >= {each:g}"] = {"distractors": others, "void_threshold": each}
        settings[f"{name} are void"] = {"distractors": others, "distractors_are_void": True}
    counts = {name: Counter() for name in settings}
    turns = [asked_names(whole, turn) for turn in range(TURNS)]
    for record in dataset.records()[: args.images]:
        result = segmenter(read_image(record["file_name"]), whole)
        truth = read_id_map(record["pan_seg_file_name"])
        ids = {segment["id"]: whole.class_names[segment["category_id"]] for segment in record["segments_info"]}
        for asked in turns:
            for name, setting in settings.items():
                outputs = result.outputs.renamed(Naming(asked, **setting))
                names = {segment.id: segment.name for segment in outputs.segments}
                for label, answer in answers(outputs.panoptic, truth, names, ids):
                    counts[name][label in asked.class_names, seen[label], answer] += 1
    for is_asked in (False, True):
        print(f"\n{'names that were asked for' if is_asked else 'names left out'}, % of segments: seen | unseen")
        print(f"{'':32}" + "".join(f"{answer:>16}" for answer in ANSWERS[0 if is_asked else 1 :]))
        for name, count in counts.items():
            totals = [sum(count[is_asked, is_seen, answer] for answer in ANSWERS) or 1 for is_seen in (True, False)]
            cells = [
                " | ".join(
                    f"{100 * count[is_asked, kind, answer] / total:5.1f}" for kind, total in zip((True, False), totals)
                )
                for answer in ANSWERS[0 if is_asked else 1 :]
            ]
            print(f"{name:32}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    sys.exit(run_program(main))
