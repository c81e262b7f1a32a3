"""Numbers that say how good a model is.

panoptic.py   panoptic_quality of files, PanopticEvaluator of id maps; PanopticWriter saves predictions
semantic.py   SemanticEvaluator: one confusion matrix, both mIoU rules
instances.py  InstanceEvaluator: COCO average precision of masks and boxes
runner.py     evaluate: a model over a data set in several modes; evaluate_augmented: with test-time augmentation;
              EVALUATORS: what a kind of data set is evaluated for
results.py    tables, lines to paste and results.json
pictures.py   Picture and Evaluator: what the runner hands over and expects; reader of label maps
averages.py   unweighted means over classes, over seen and unseen ones
"""

from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth, encode_masks
from fcclip.evaluation.panoptic import (
    ClassCounts,
    PanopticEvaluator,
    PanopticWriter,
    compare_segments,
    panoptic_quality,
    write_id_map,
)
from fcclip.evaluation.pictures import Evaluator, Picture, read_labels
from fcclip.evaluation.results import (
    copypaste_lines,
    current_commit,
    format_table,
    format_value,
    headlines,
    unmet_expectations,
    write_results,
)
from fcclip.evaluation.runner import EVALUATORS, build_evaluators, evaluate, evaluate_augmented
from fcclip.evaluation.semantic import SemanticEvaluator

__all__ = [
    "EVALUATORS",
    "ClassCounts",
    "Evaluator",
    "InstanceEvaluator",
    "InstanceTruth",
    "PanopticEvaluator",
    "PanopticWriter",
    "Picture",
    "SemanticEvaluator",
    "build_evaluators",
    "compare_segments",
    "copypaste_lines",
    "current_commit",
    "encode_masks",
    "evaluate",
    "evaluate_augmented",
    "format_table",
    "format_value",
    "headlines",
    "panoptic_quality",
    "read_labels",
    "unmet_expectations",
    "write_id_map",
    "write_results",
]
