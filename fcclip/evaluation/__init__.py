"""Numbers that say how good a model is.

panoptic.py   panoptic_quality of files, PanopticEvaluator of id maps
semantic.py   SemanticEvaluator: one confusion matrix, both mIoU rules
instances.py  InstanceEvaluator: COCO average precision of masks and boxes
lvis.py       LvisEvaluator: the same by the federated rule of LVIS
cityscapes.py CityscapesInstanceEvaluator, CityscapesSemanticEvaluator: the protocol of cityscapesScripts
predictions.py  PredictionWriter, SavedPredictions: what a model predicted, on the disk; evaluations that resume
oracle.py     true masks with predicted classes, and the other way round
external.py   evaluate_predictions: without a model, also predictions of other programs
runner.py     evaluate: a model over a data set in several modes; evaluate_augmented: with test-time augmentation;
thread_pool.py Background: evaluation in threads while the network runs
comparison.py before and after a fine-tuning: the same classes as a table and as finetune.json
zero_shot.py  the table of the model zoo: published settings and figures, Report
page.py       write_page: the best, median and worst images as HTML
results.py    tables, lines to paste and results.json
ground_truth.py   GroundTruth and Evaluator: what the runner hands over and expects
histograms.py joint histograms of two maps
averages.py   unweighted means over classes, over seen and unseen ones
"""

from fcclip.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth, encode_masks, instances_of_rows
from fcclip.evaluation.lvis import LvisEvaluator
from fcclip.evaluation.panoptic import (
    ClassCounts,
    PanopticEvaluator,
    compare_segments,
    panoptic_quality,
    write_id_map,
)
from fcclip.evaluation.predictions import PredictionWriter, SavedPredictions, saved_modes
from fcclip.evaluation.results import (
    copypaste_lines,
    current_commit,
    format_table,
    format_value,
    headlines,
    unmet_expectations,
    write_results,
)
from fcclip.evaluation.runner import build_evaluators, evaluate, evaluate_augmented
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.evaluation.thread_pool import Background

__all__ = [
    "Background",
    "CityscapesInstanceEvaluator",
    "CityscapesSemanticEvaluator",
    "ClassCounts",
    "Evaluator",
    "GroundTruth",
    "InstanceEvaluator",
    "InstanceTruth",
    "LvisEvaluator",
    "PanopticEvaluator",
    "PredictionWriter",
    "SavedPredictions",
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
    "instances_of_rows",
    "panoptic_quality",
    "saved_modes",
    "unmet_expectations",
    "write_id_map",
    "write_results",
]
