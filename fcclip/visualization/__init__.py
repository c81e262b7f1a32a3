"""Images of predictions and labels: arrays in, arrays out.

colors.py  a colour per class name, and shades of it for the instances of a class
draw.py    draw_panoptic, draw_instances, draw_labels: masks, outlines, names and scores over an image
sheet.py   contact_sheet: images, labels and predictions next to each other
"""

from fcclip.visualization.colors import class_colors, shade
from fcclip.visualization.draw import draw_instances, draw_labels, draw_panoptic
from fcclip.visualization.sheet import contact_sheet

__all__ = ["class_colors", "contact_sheet", "draw_instances", "draw_labels", "draw_panoptic", "shade"]
