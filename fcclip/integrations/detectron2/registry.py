"""Everything under its published name in detectron2's registries and catalogs."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from fcclip.errors import InputError
from fcclip.integrations.detectron2.catalog import register_datasets, taken_datasets
from fcclip.integrations.detectron2.model import (
    CLIP,
    FCCLIP,
    TRANSFORMER_DECODER_REGISTRY,
    FCCLIPHead,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
)

PARTS = (
    ("META_ARCH", META_ARCH_REGISTRY, FCCLIP),
    ("BACKBONE", BACKBONE_REGISTRY, CLIP),
    ("SEM_SEG_HEADS", SEM_SEG_HEADS_REGISTRY, FCCLIPHead),
    ("SEM_SEG_HEADS", SEM_SEG_HEADS_REGISTRY, MSDeformAttnPixelDecoder),
    ("TRANSFORMER_MODULE", TRANSFORMER_DECODER_REGISTRY, MultiScaleMaskedTransformerDecoder),
)


def register() -> None:
    """Makes FC-CLIP, its parts and its data sets known to detectron2; a second call changes nothing.

    No file is read. The data sets are looked for below $DETECTRON2_DATASETS, as it is when they are loaded.

    Raises:
        ValueError: a name that is taken by something else; nothing has been registered then.
    """
    taken = [
        f"'{part.__name__}' in the registry {title}, by {registry.get(part.__name__)!r}"
        for title, registry, part in PARTS
        if part.__name__ in registry and registry.get(part.__name__) is not part
    ]
    taken += [f"data set '{name}' in detectron2's catalogs" for name in taken_datasets()]
    if taken:
        raise InputError(
            f"names of FC-CLIP are taken by something else: {'; '.join(taken)}. Two projects with the same names, such "
            "as Mask2Former's own code, cannot serve one process: import only one of them. A data set of your own can "
            "have any other name."
        )
    for _, registry, part in PARTS:
        if part.__name__ not in registry:
            registry.register(part)
    register_datasets()
