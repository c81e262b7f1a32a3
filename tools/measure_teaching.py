"""Measures `teach` on the shapes world: classes that training never saw, called by words that mean nothing, then shown.

    python tools/measure_teaching.py --set shapes_val --examples 1 5

All unseen classes lose their names at once. Examples are the first segments of each in `shapes_tune`, whose images are
not those of the set. The figures are few-shot, and not to be put beside zero-shot ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from fcclip import Segmenter
from fcclip.data import dataset_vocabulary, get_dataset, read_image
from fcclip.data.images import read_id_map
from fcclip.errors import run_program
from fcclip.evaluation import evaluate
from fcclip.modeling import FCCLIP, ScoredMasks
from fcclip.reports.zero_shot import set_config
from fcclip.vocabulary import Vocabulary

SOURCE, SMALLEST = "shapes_tune", 100  # where examples come from; their pixels, at least
SYLLABLES = ["glo", "bli", "dax", "wu", "zor", "fe", "to", "ki", "mup", "rin", "sket", "van", "plo", "quor", "jub"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", default="shapes_val", help="of the shapes world (default: %(default)s)")
    add("--images", type=int, metavar="N", help="only the first of them")
    add("--examples", nargs="+", type=int, default=[1, 5], metavar="N", help="of each class (default: 1 and 5)")
    return parser.parse_args(arguments)


def nonsense(vocabulary: Vocabulary, indices: Sequence[int]) -> Vocabulary:
    """The same classes, some of them called by words of two syllables."""
    draw = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < len(indices):
        words["".join(draw.choice(SYLLABLES, 2))] = None
    classes = list(vocabulary.classes)
    for index, word in zip(indices, words):
        classes[index] = replace(classes[index], name=word, synonyms=(word,))
    return replace(vocabulary, name="nonsense", classes=tuple(classes), source_sha256="")


def teach(segmenter: Segmenter, names: Mapping[int, str], counts: Sequence[int]) -> dict[int, Mapping[str, Tensor]]:
    """Number of examples -> name -> its vector; the segmenter knows the largest number afterwards."""
    taught, places = {}, {index: [] for index in names}
    for record in get_dataset(SOURCE).records():
        for segment in record["segments_info"]:
            if segment["category_id"] in names and segment["area"] >= SMALLEST:
                places[segment["category_id"]].append((record, segment["id"]))
    for number in range(max(counts)):
        for index, name in names.items():
            record, segment_id = places[index][number]
            segmenter.teach(
                name, read_image(record["file_name"]), read_id_map(record["pan_seg_file_name"]) == segment_id
            )
        taught[number + 1] = segmenter.model.text_encoder.shown
    return {count: taught[count] for count in counts}


class RenamingModel:
    """Scores once, and gives outputs with the names of a way to call the classes, which stands for the ensemble.

    Args:
        model: is used, not copied.
        ways: vocabulary and shown names.
    """

    def __init__(self, model: FCCLIP, ways: Mapping[str, tuple[Vocabulary, Mapping[str, Tensor]]]) -> None:
        self.model, self.ways, self.training = model, ways, False

    def train(self, mode: bool = True) -> RenamingModel:
        return self

    def eval(self) -> RenamingModel:
        return self

    def score(self, inputs: Sequence[Mapping], vocabulary: Vocabulary) -> list[ScoredMasks]:
        return self.model.score(inputs, vocabulary)

    def outputs(self, scored: ScoredMasks, *, ensemble: str, **options: Any) -> dict[str, Any]:
        vocabulary, self.model.text_encoder.shown = self.ways[ensemble]
        return self.model.outputs(self.model.rescore(scored, vocabulary), **options)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    segmenter, dataset = Segmenter.from_pretrained("shapes"), get_dataset(args.set)
    whole, trained = dataset_vocabulary(dataset), segmenter.model.seen_vocabulary
    unseen = [index for index, is_seen in enumerate(whole.seen_by(trained).tolist()) if not is_seen]
    renamed = nonsense(whole, unseen)
    taught = teach(segmenter, {index: renamed.class_names[index] for index in unseen}, args.examples)
    ways = {"true names": (whole, {}), "nonsense": (renamed, {})}
    ways |= {f"{count} shown": (renamed, words) for count, words in taught.items()}
    cfg = set_config(segmenter.cfg, dataset)
    results = evaluate(
        RenamingModel(segmenter.model, ways),
        cfg,
        dataset,
        modes={way: way for way in ways},
        training_vocabulary=trained,
        vocabulary=whole,
        max_images=args.images,
    )
    print(f"{dataset.name}, {len(unseen)} unseen classes renamed, percent: all / seen / unseen")
    for way, tasks in results.items():
        figures = [
            " / ".join(f"{tasks[task][metric + group]:.1f}" for group in ("", "_seen", "_unseen"))
            for task, metric in (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "mIoU"))
        ]
        print(f"{way:12} " + "   ".join(f"{name} {text}" for name, text in zip(("PQ", "AP", "mIoU"), figures)))


if __name__ == "__main__":
    sys.exit(run_program(main))
