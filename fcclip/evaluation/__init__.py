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
              EVALUATORS: what a kind of data set is evaluated for
background.py Background: evaluation in threads while the network runs
comparison.py before and after a fine-tuning: the same classes as a table and as finetune.json
zero_shot.py  the table of the model zoo: published settings and figures, Report
page.py       write_page: the best, median and worst pictures as HTML
results.py    tables, lines to paste and results.json
pictures.py   Picture and Evaluator: what the runner hands over and expects
histograms.py joint histograms of two maps
averages.py   unweighted means over classes, over seen and unseen ones
"""

from fcclip.evaluation.background import Background
from fcclip.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemanticEvaluator
from fcclip.evaluation.comparison import Comparison, format_comparison, grouped_figures
from fcclip.evaluation.external import (
    LabelSource,
    PanopticSource,
    ResultsSource,
    SavedSource,
    evaluate_predictions,
)
from fcclip.evaluation.instances import InstanceEvaluator, InstanceTruth, encode_masks, instances_of_rows
from fcclip.evaluation.lvis import LvisEvaluator
from fcclip.evaluation.oracle import ORACLES
from fcclip.evaluation.page import PageSet, write_page
from fcclip.evaluation.panoptic import (
    ClassCounts,
    PanopticEvaluator,
    compare_segments,
    panoptic_quality,
    write_id_map,
)
from fcclip.evaluation.pictures import Evaluator, Picture
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
from fcclip.evaluation.runner import EVALUATORS, build_evaluators, evaluate, evaluate_augmented
from fcclip.evaluation.semantic import SemanticEvaluator
from fcclip.evaluation.zero_shot import (
    FAIL,
    MIOU_RULE,
    Plan,
    Report,
    backbone_of,
    backbone_of_weights,
    cells_of,
    default_sets,
    differences,
    logged_figures,
    plan_sets,
    published_results,
)

__all__ = [
    "EVALUATORS",
    "FAIL",
    "MIOU_RULE",
    "ORACLES",
    "Background",
    "CityscapesInstanceEvaluator",
    "CityscapesSemanticEvaluator",
    "ClassCounts",
    "Comparison",
    "Evaluator",
    "InstanceEvaluator",
    "InstanceTruth",
    "LabelSource",
    "LvisEvaluator",
    "PageSet",
    "PanopticEvaluator",
    "PanopticSource",
    "Picture",
    "Plan",
    "PredictionWriter",
    "Report",
    "ResultsSource",
    "SavedPredictions",
    "SavedSource",
    "SemanticEvaluator",
    "backbone_of",
    "backbone_of_weights",
    "build_evaluators",
    "cells_of",
    "compare_segments",
    "copypaste_lines",
    "current_commit",
    "default_sets",
    "differences",
    "encode_masks",
    "evaluate",
    "evaluate_augmented",
    "evaluate_predictions",
    "format_comparison",
    "format_table",
    "format_value",
    "grouped_figures",
    "headlines",
    "instances_of_rows",
    "logged_figures",
    "panoptic_quality",
    "plan_sets",
    "published_results",
    "saved_modes",
    "unmet_expectations",
    "write_id_map",
    "write_page",
    "write_results",
]
