"""Everything under its published name in detectron2's registries and catalogs."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from fcclip.errors import InputError
from fcclip.integrations.detectron2.catalog import register_datasets
from fcclip.integrations.detectron2.model import (
    ARCHITECTURES,
    CLIP,
    TRANSFORMER_DECODER_REGISTRY,
    FCCLIPHead,
    MSDeformAttnPixelDecoder,
    MultiScaleMaskedTransformerDecoder,
)

PARTS = (
    *((META_ARCH_REGISTRY, architecture) for architecture in ARCHITECTURES.values()),
    (BACKBONE_REGISTRY, CLIP),
    (SEM_SEG_HEADS_REGISTRY, FCCLIPHead),
    (SEM_SEG_HEADS_REGISTRY, MSDeformAttnPixelDecoder),
    (TRANSFORMER_DECODER_REGISTRY, MultiScaleMaskedTransformerDecoder),
)


def register() -> None:
    """Makes every architecture, FC-CLIP's parts and the data sets known to detectron2; a second call changes nothing.

    No file is read. The data sets are looked for below $DETECTRON2_DATASETS, as it is when they are loaded.

    Raises:
        ValueError: a name that is taken by something else.
    """
    for registry, part in PARTS:
        name = part.__name__
        if name in registry and registry.get(name) is not part:
            raise InputError(
                f"'{name}' in detectron2's registry {registry._name} is {registry.get(name)!r}. Two projects with the "
                "same names, such as Mask2Former's own code, cannot serve one process: import only one of them."
            )
        if name not in registry:
            registry.register(part)
    register_datasets()
