"""Matching, point sampling, mask and class losses; tensors in, tensors out.

points.py     where losses look: points, bilinear sampling of predictions and of labels, the uncertain ones
matching.py   match: the Hungarian assignment of queries to segments
criterion.py  SetCriterion: the three losses with deep supervision
"""

from fcclip.losses.criterion import SetCriterion
from fcclip.losses.matching import match
from fcclip.losses.points import point_sources, sample_maps, sample_targets, uncertain_points

__all__ = [
    "SetCriterion",
    "match",
    "point_sources",
    "sample_maps",
    "sample_targets",
    "uncertain_points",
]
