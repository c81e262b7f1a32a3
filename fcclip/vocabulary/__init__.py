"""Classes, their synonyms and the prompts made of them. Names are data: one JSON a label set in `names/`.

vocabulary.py  Vocabulary and ClassEntry: reading, parsing, comparing
templates.py   TEMPLATE_SETS and prompts: the sentences that text encoders read
"""

from fcclip.vocabulary.templates import TEMPLATE_SETS, TEMPLATES, prompts
from fcclip.vocabulary.vocabulary import ClassEntry, Vocabulary, builtin_names

__all__ = ["TEMPLATES", "TEMPLATE_SETS", "ClassEntry", "Vocabulary", "builtin_names", "prompts"]
