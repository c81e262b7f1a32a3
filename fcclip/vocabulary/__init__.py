"""Classes, their synonyms and the prompts made of them. Names are data: one JSON a label set in `names/`.

vocabulary.py  Vocabulary and ClassEntry: reading, parsing, comparing
templates.py   TEMPLATE_SETS and prompts: the sentences that text encoders read
"""

from fcclip.vocabulary.templates import TEMPLATE_SETS, TEMPLATES, prompts
from fcclip.vocabulary.vocabulary import (
    ClassEntry,
    Vocabulary,
    builtin_names,
    plain_name,
    refuse_same_names,
    split_mark,
)

__all__ = [
    "TEMPLATES",
    "TEMPLATE_SETS",
    "ClassEntry",
    "Vocabulary",
    "builtin_names",
    "plain_name",
    "prompts",
    "refuse_same_names",
    "split_mark",
]
