"""Draws the images of docs/class_names.md and of the README with the shipped weights.

python tools/draw_class_names.py --output docs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from stages import REPOSITORY

from fcclip import Segmenter
from fcclip.errors import run_program
from fcclip.visualization import contact_sheet

HEARTS = "blue heart; blue cross; yellow square; purple star; orange triangle; hay:stuff"
THREE = "red circle; blue star, azure star; sand:stuff"
ALL = f"red heart; {HEARTS}"
# file of the sheet -> image, and title -> names and options of a call
SHEETS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "segmenter": ("shapes_1", {THREE: (THREE, {})}),
    "class_names": (
        "shapes_2",
        {
            "shapes without colours": ("circle; square; cross; brick:stuff; wood:stuff", {}),
            "and their colours": (
                "orange circle; pink square; green square; orange cross; brick:stuff; wood:stuff",
                {},
            ),
            "all 60 names of the world": ("shapes", {}),
        },
    ),
    "class_names_unknown": (
        "shapes_3",
        {
            "every name": (ALL, {}),
            "red heart left out": (HEARTS, {}),
            "left out, unknown=True": (HEARTS, {"unknown": True}),
        },
    ),
    "class_names_ensemble": (
        "shapes_3",
        {
            "alpha 0, beta 0: the decoder alone": ("shapes", {"ensemble": (0.0, 0.0)}),
            "alpha 0.4, beta 0.8: both": ("shapes", {"ensemble": (0.4, 0.8)}),
            "alpha 1, beta 1: CLIP alone": ("shapes", {"ensemble": (1.0, 1.0)}),
        },
    ),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs", help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    folder = parse_arguments(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    segmenter = Segmenter.from_pretrained("shapes")
    for name, (image, calls) in SHEETS.items():
        result = segmenter(REPOSITORY / "demo" / "images" / f"{image}.jpg")
        drawings = [result.relabel(names, **options).draw() for names, options in calls.values()]
        if len(drawings) == 1:
            drawings = [result.image, *drawings]
        titles = list(calls) if len(calls) > 1 else ["image", *calls]
        sheet = Image.fromarray(contact_sheet([drawings], titles=titles))
        sheet.thumbnail((1500, 1500))
        sheet.save(folder / f"{name}.jpg", quality=85)
        print(folder / f"{name}.jpg")


if __name__ == "__main__":
    sys.exit(run_program(main))
