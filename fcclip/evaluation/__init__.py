"""Numbers that say how good a model is.

runner.py     evaluate: a model over a data set in several modes; evaluate_augmented: with test-time augmentation
evaluators.py build_evaluators: which evaluators a data set gets
ground_truth.py  GroundTruth and Evaluator: what the runner hands over and expects
panoptic.py   PanopticEvaluator: panoptic quality of id maps
video.py      VideoPanopticEvaluator: panoptic quality of tubes, over windows of frames
semantic.py   SemanticEvaluator: one confusion matrix, both mIoU rules
recall.py     MaskRecallEvaluator: whether some proposal covers a class, whatever it is called
boundary.py   BoundaryEvaluator: boundary IoU of each class
instances.py  InstanceEvaluator: COCO average precision of masks and boxes
lvis.py       LvisEvaluator: the same by the federated rule of LVIS
pairs.py      PairEvaluator, NovelClassesEvaluator: in folds of classes, one prompted class an image, and all novel ones
cityscapes.py CityscapesInstanceEvaluator, CityscapesSemanticEvaluator: the protocol of cityscapesScripts
predictions.py  PredictionWriter, SavedPredictions: what a model predicted, on the disk; evaluations that resume
thread_pool.py  EvaluationThreads: evaluation in threads while the network runs
all_sets.py   evaluate_all: DATASETS.TEST one after the other, with results.json
drawings.py   draw_predictions: images for the writers of a training
meter.py      progress, and where the time goes
results.py    tables, lines to paste and results.json
histograms.py joint histograms of two maps
averages.py   unweighted means over classes, over seen and unseen ones
"""

from fcclip.evaluation.boundary import BoundaryEvaluator
from fcclip.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from fcclip.evaluation.evaluators import build_evaluators
from fcclip.evaluation.ground_truth import Evaluator, GroundTruth
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth, encode_masks
from fcclip.evaluation.lvis import LvisEvaluator
from fcclip.evaluation.panoptic import ClassCounts, PanopticEvaluator, compare_segments, write_id_map
from fcclip.evaluation.predictions import PredictionWriter, SavedPredictions, saved_modes
from fcclip.evaluation.recall import MaskRecallEvaluator
from fcclip.evaluation.results import (
    copypaste_lines,
    current_commit,
    format_table,
    format_value,
    headlines,
    unmet_expectations,
    write_results,
)
from fcclip.evaluation.runner import Oracle, evaluate, evaluate_augmented
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.evaluation.thread_pool import EvaluationThreads
from fcclip.evaluation.video import VideoPanopticEvaluator, VideoTruth

__all__ = [
    "BoundaryEvaluator",
    "CityscapesInstanceEvaluator",
    "CityscapesSemanticEvaluator",
    "ClassCounts",
    "EvaluationThreads",
    "Evaluator",
    "GroundTruth",
    "InstanceEvaluator",
    "InstanceTruth",
    "LvisEvaluator",
    "MaskRecallEvaluator",
    "Oracle",
    "PanopticEvaluator",
    "PredictionWriter",
    "SavedPredictions",
    "SemanticEvaluator",
    "VideoPanopticEvaluator",
    "VideoTruth",
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
    "saved_modes",
    "unmet_expectations",
    "write_id_map",
    "write_results",
]
