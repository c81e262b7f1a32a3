"""What is made of results.

zero_shot.py  the table of the model zoo: published settings and figures, report_of
page.py       write_page: the best, median and worst images as HTML
external.py   evaluate_predictions: without a model, also predictions of other programs
oracle.py     true masks, true classes or true void in the place of predicted ones; all in one table
"""

from fcclip.reports.external import LabelSource, PanopticSource, ResultsSource, SavedSource, evaluate_predictions
from fcclip.reports.oracle import ORACLES, EveryOracle, oracle_modes, oracle_table
from fcclip.reports.page import write_page
from fcclip.reports.zero_shot import (
    FAIL,
    MIOU_RULE,
    Outcome,
    Plan,
    Report,
    backbone_of_weights,
    plan_sets,
    published_results,
    report_of,
)

__all__ = [
    "FAIL",
    "MIOU_RULE",
    "ORACLES",
    "EveryOracle",
    "LabelSource",
    "Outcome",
    "PanopticSource",
    "Plan",
    "Report",
    "ResultsSource",
    "SavedSource",
    "backbone_of_weights",
    "evaluate_predictions",
    "oracle_modes",
    "oracle_table",
    "plan_sets",
    "published_results",
    "report_of",
    "write_page",
]
