"""Prompt templates: the fourteen of ViLD, as FC-CLIP uses them, and the 32 of Fusioner (capitals and full stops as
published)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
_SIZES = ("", "small ", "medium ", "large ")
_BEGINNINGS = ("There is a", "There is the", "This is a", "This is the", "This is one")
FUSIONER_TEMPLATES = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    *(f"This is a {kind}photo of a {size}{{}}" for kind in ("", "masked ", "cropped ") for size in _SIZES),
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    *(f"{beginning} {masked}{{}} in the scene" for masked in ("", "masked ") for beginning in _BEGINNINGS),
)
TEMPLATE_SETS = {"vild": TEMPLATES, "fusioner": FUSIONER_TEMPLATES}


def prompts(synonyms: Iterable[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Every template filled with every synonym, templates fastest."""
    return [template.format(synonym) for synonym in synonyms for template in templates]
