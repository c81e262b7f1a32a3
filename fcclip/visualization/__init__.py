"""Images of predictions and labels: arrays in, arrays out.

colors.py  a colour per class, far from its neighbours, and shades of it for the instances of a class
draw.py    draw_panoptic, draw_labels: masks, outlines, names and scores over an image
sheet.py   contact_sheet: images, labels and predictions next to each other
"""

from fcclip.visualization.colors import class_color, instance_color
from fcclip.visualization.draw import draw_labels, draw_panoptic
from fcclip.visualization.sheet import contact_sheet

__all__ = ["class_color", "contact_sheet", "draw_labels", "draw_panoptic", "instance_color"]
