"""The last place that sees the config: names become parts, keys become plain values."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from fvcore.common.config import CfgNode
from torch import nn

from fcclip.config import cache_folder, lookup, resolve_device
from fcclip.data.vocabularies import dataset_vocabulary
from fcclip.errors import InputError
from fcclip.losses import SetCriterion
from fcclip.modeling.architecture import Architecture, Ensemble
from fcclip.modeling.backbones.bert import Bert, BertTextEncoder
from fcclip.modeling.backbones.clip import FAMILIES, CLIPBackbone, ConvNeXtCLIP, build_clip
from fcclip.modeling.backbones.sam import SamImageEncoder, build_sam
from fcclip.modeling.backbones.vit import TimmViT, ViTCLIP
from fcclip.modeling.fcclip import FCCLIP
from fcclip.modeling.frozenseg import FrozenSeg, FrozenSegDecoder, FrozenSegHead
from fcclip.modeling.fusion import ConvDecoder, Fusion
from fcclip.modeling.fusioner import Fusioner
from fcclip.modeling.head import FCCLIPHead
from fcclip.modeling.maft import FORMS, MAFTPlus, TextTransfer
from fcclip.modeling.mask_adapter import MaskAdapter, MaskAdapterLoss
from fcclip.modeling.mask_decoder import MultiScaleMaskedTransformerDecoder
from fcclip.modeling.openseg import OpenSegEnsemble
from fcclip.modeling.out_of_vocabulary import OUT_OF_VOCABULARY_CLASSIFIERS, RegionClassifier
from fcclip.modeling.outputs import HEADS, OutputSettings
from fcclip.modeling.pixel_decoder import NUM_POINTS, MSDeformAttnPixelDecoder
from fcclip.modeling.sam_pixel_decoder import FrozenSegPixelDecoder
from fcclip.modeling.text import TextEncoder
from fcclip.modeling.windows import Windows
from fcclip.ops import select_engine
from fcclip.vocabulary import TEMPLATE_SETS, Vocabulary

logger = logging.getLogger(__name__)


def build_model(
    cfg: CfgNode, *, train_vocabulary: Vocabulary | None = None, test_vocabulary: Vocabulary | None = None
) -> Architecture:
    """The model that a config describes, on its device, in evaluation mode, with freshly initialised heads.

    Args:
        cfg: a full config.
        train_vocabulary: classes of the training labels; default: the vocabulary of DATASETS.TRAIN[0]. It may be
            smaller than NUM_CLASSES; that the two agree is checked when training starts.
        test_vocabulary: classes to use when a call brings none; default: the vocabulary of DATASETS.TEST[0].

    Raises:
        ValueError: a name that nothing is called, values that cannot work together; the message gives the full key.
    """
    folder = cfg.MODEL.FC_CLIP.VOCABULARIES
    if train_vocabulary is None and cfg.DATASETS.TRAIN:
        train_vocabulary = dataset_vocabulary(cfg.DATASETS.TRAIN[0], folder)
    if test_vocabulary is None and cfg.DATASETS.TEST:
        test_vocabulary = dataset_vocabulary(cfg.DATASETS.TEST[0], folder)
    architecture, parts = lookup("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCHITECTURES)
    model = architecture(**parts(cfg), train_vocabulary=train_vocabulary, test_vocabulary=test_vocabulary)
    if stage := cfg.MODEL.MASK_ADAPTER.TRAIN:
        mixed = lookup("MODEL.MASK_ADAPTER.TRAIN", stage, {"warmup": False, "mixed": True})
        if not isinstance(getattr(model, "classifier", None), MaskAdapter):
            raise InputError(
                f"MODEL.MASK_ADAPTER.TRAIN is {stage}, but the model has no adapter: set "
                "MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER mask_adapter"
            )
        model.extra_losses.append(MaskAdapterLoss(model, mixed=mixed))
    device = resolve_device(cfg.MODEL.DEVICE)
    model.amp_dtype = amp_dtype(cfg, device, "TEST")
    compile_parts(model, cfg.MODEL.COMPILE)
    return model.to(device).eval()


def compile_parts(model: Architecture, names: str) -> None:
    """Gives parts of a model to torch.compile, in place; `names` of `COMPILABLE` are separated by commas, and "all" are
    those that the model has: everything from images to the logits of both classifiers."""
    # the cached functions of these parts depend on their arguments alone
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    names = [name for name in map(str.strip, names.split(",")) if name]
    for name in COMPILABLE if names == ["all"] else names:
        path = lookup("part in MODEL.COMPILE", name, {**COMPILABLE, "all": "all"})
        try:
            part = attrgetter(path)(model)
        except AttributeError as error:
            if names == ["all"]:
                continue
            raise InputError(
                f"MODEL.COMPILE names '{name}', which {type(model).__name__} has not; remove it"
            ) from error
        if isinstance(part, nn.Module):
            part.compile()
        else:
            setattr(model, path, torch.compile(part))
        logger.info("%s: compiled by torch at its first use, which takes minutes", name)
    if names:
        _say_compile_times()


@functools.cache  # once in a process
def _say_compile_times() -> None:
    """Logs how long each compilation takes from now on."""
    handler, began = torch._dynamo.callback.callback_handler, []  # importing it takes seconds
    handler.register_start_callback(lambda _: began.append(time.perf_counter()))
    handler.register_end_callback(lambda _: logger.info("torch.compile took %.1f s", time.perf_counter() - began.pop()))


def amp_dtype(cfg: CfgNode, device: torch.device, group: str = "SOLVER") -> torch.dtype | None:
    """The autocast type of training (`group` SOLVER) or evaluation (TEST): what its AMP keys ask for where the device
    gains by it, which is CUDA, and in evaluation a CPU that multiplies bfloat16; else None, fp32.

    Raises:
        ValueError: unknown type, or one that this GPU lacks.
    """
    key, amp = f"{group}.AMP", cfg[group].AMP
    if not amp.ENABLED:
        return None
    dtype = lookup(f"{key}.DTYPE", amp.DTYPE, {"float16": torch.float16, "bfloat16": torch.bfloat16})
    if device.type == "cpu" and group == "TEST" and dtype is torch.bfloat16 and cpu_multiplies_bfloat16():
        return dtype
    if device.type != "cuda":
        where = "training" if group == "SOLVER" else "evaluation"
        logger.info("%s.ENABLED has no effect on %s: %s in float32", key, device.type, where)
        return None
    if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise InputError(f"{key}.DTYPE is bfloat16, which this GPU does not support; use float16")
    return dtype


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has AMX or AVX512-BF16; without them bfloat16 is slower than fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def test_modes(cfg: CfgNode) -> dict[str, Ensemble]:
    """The ensembles of the three values of TEST.MODE; `ensemble` has the config's weights."""
    return {
        "ensemble": build_ensemble(cfg),
        "in_vocabulary": Ensemble(0.0, 0.0),
        "out_of_vocabulary": Ensemble(1.0, 1.0),
    }


test_modes.__test__ = False  # pytest takes it for a test otherwise


def build_ensemble(cfg: CfgNode) -> Ensemble:
    """How MODEL.FC_CLIP joins both classifiers."""
    fc_clip = cfg.MODEL.FC_CLIP
    for head in fc_clip.CLIP_TRUST_HEADS:
        lookup("output in MODEL.FC_CLIP.CLIP_TRUST_HEADS", head, dict.fromkeys(HEADS[:3]))
    scopes = {"unseen": True, "all": False}
    shares = (fc_clip.GEOMETRIC_ENSEMBLE_ALPHA, fc_clip.GEOMETRIC_ENSEMBLE_BETA)
    return Ensemble(
        *(1.0 if share == -1 else share for share in shares),  # as files of MAFT+ say "CLIP alone"
        trust=fc_clip.CLIP_TRUST_WEIGHT,
        trust_unseen_only=lookup("MODEL.FC_CLIP.CLIP_TRUST_SCOPE", fc_clip.CLIP_TRUST_SCOPE, scopes),
        trust_heads=tuple(fc_clip.CLIP_TRUST_HEADS),
    )


def options_of(cfg: CfgNode) -> tuple[str, ...]:
    """What a config turns on beyond the published architecture; results carry these names."""
    trust, part = build_ensemble(cfg).trust, cfg.MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER
    names = {
        f"void trust {trust:g}": trust and cfg.TEST.MODE == "ensemble",
        "MAFT+": cfg.MODEL.META_ARCHITECTURE == "MAFT_Plus",
        "Mask-Adapter": part == "mask_adapter",
        f"autocast {cfg.TEST.AMP.DTYPE}": cfg.TEST.AMP.ENABLED,
    }
    return tuple(name for name, is_on in names.items() if is_on)


def enabled_heads(cfg: CfgNode) -> tuple[str, ...]:
    """The outputs that MODEL.MASK_FORMER.TEST asks for, of `HEADS`; at least one."""
    test = cfg.MODEL.MASK_FORMER.TEST
    switches = {"semantic": test.SEMANTIC_ON, "panoptic": test.PANOPTIC_ON, "instances": test.INSTANCE_ON}
    heads = tuple(head for head, is_on in switches.items() if is_on)
    if not heads:
        raise InputError(
            "MODEL.MASK_FORMER.TEST turns SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON off: nothing would be computed"
        )
    return (*heads, "recall") if test.RECALL_ON else heads


class Levels(Protocol):
    """What a head must know of the backbone it is built on; every `CLIPBackbone` says it."""

    channels: Mapping[str, int]
    strides: Mapping[str, int]
    embed_dim: int


def fcclip_parts(cfg: CfgNode) -> dict[str, Any]:
    """What `FCCLIP` takes besides its vocabularies."""
    backbone = lookup("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONES)(cfg)
    check_embed_dim(cfg, backbone)
    head = lookup("MODEL.SEM_SEG_HEAD.NAME", cfg.MODEL.SEM_SEG_HEAD.NAME, SEM_SEG_HEADS)(cfg, backbone)
    return {"backbone": backbone, "sem_seg_head": head, **fcclip_arguments(cfg, backbone)}


def maft_parts(cfg: CfgNode) -> dict[str, Any]:
    """What `MAFTPlus` takes besides its vocabularies."""
    parts, key = fcclip_parts(cfg), "MODEL.FC_CLIP.CDT_FORM"
    if not isinstance(parts["backbone"], ConvNeXtCLIP):
        raise InputError(f"MAFT+ is for ConvNeXt CLIPs, not '{cfg.MODEL.FC_CLIP.CLIP_MODEL_NAME}'")
    if isinstance(parts["classifier"], MaskAdapter):  # it was trained on cells that are read as MAFT+ reads them
        raise InputError("MAFT+ has no Mask-Adapter here: leave MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER empty")
    form = cfg.MODEL.FC_CLIP.CDT_FORM or ("panoptic" if cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON else "semantic")
    lookup(key, form, dict.fromkeys(FORMS))
    return {**parts, "transfer": TextTransfer(dim=parts["backbone"].embed_dim, form=form)}


def check_embed_dim(cfg: CfgNode, backbone: CLIPBackbone) -> None:
    """Refuses a MODEL.FC_CLIP.EMBED_DIM that is not the width of this CLIP's joint space."""
    if backbone.embed_dim != cfg.MODEL.FC_CLIP.EMBED_DIM:
        fc_clip = cfg.MODEL.FC_CLIP
        raise InputError(
            f"MODEL.FC_CLIP.EMBED_DIM is {fc_clip.EMBED_DIM}, but CLIP '{fc_clip.CLIP_MODEL_NAME}' has a joint space "
            f"of {backbone.embed_dim}"
        )


def fcclip_arguments(cfg: CfgNode, backbone: CLIPBackbone) -> dict[str, Any]:
    """What `FCCLIP` takes besides its backbone, its head and its vocabularies."""
    return {
        "classifier": build_classifier(cfg, backbone),
        "criterion": build_criterion(cfg),
        "ensemble_on_valid_mask": cfg.MODEL.FC_CLIP.ENSEMBLE_ON_VALID_MASK,
        "text_encoder": TextEncoder(backbone.clip_model, cache_dir=text_cache(cfg)),
        **settings(cfg),
    }


def settings(cfg: CfgNode) -> dict[str, Any]:
    """What `BaseArchitecture` takes besides its encoders and its vocabularies."""
    return {
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "size_divisibility": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
        "heads": enabled_heads(cfg),
        "ensemble": lookup("TEST.MODE", cfg.TEST.MODE, test_modes(cfg)),
        "output_settings": build_output_settings(cfg),
    }


def text_cache(cfg: CfgNode) -> Path:
    """The folder of text features."""
    folder = cfg.MODEL.FC_CLIP.TEXT_CACHE_DIR
    return Path(folder).expanduser() if folder else cache_folder()


def fusioner_parts(cfg: CfgNode) -> dict[str, Any]:
    """What `Fusioner` takes besides its vocabularies."""
    key, fusioner = "MODEL.BACKBONE.NAME", cfg.MODEL.FUSIONER
    backbone = lookup(key, cfg.MODEL.BACKBONE.NAME, VISION_ENCODERS)(cfg)
    [patch] = backbone.strides.values() if len(backbone.strides) == 1 else [1]
    divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    if divisibility % patch or fusioner.WINDOW % patch:
        raise InputError(
            f"MODEL.MASK_FORMER.SIZE_DIVISIBILITY {divisibility} and MODEL.FUSIONER.WINDOW {fusioner.WINDOW} must be "
            f"multiples of {patch}, the patch of the vision encoder"
        )
    templates = lookup("MODEL.FUSIONER.TEMPLATES", fusioner.TEMPLATES, TEMPLATE_SETS)
    build_text = lookup("MODEL.FUSIONER.TEXT_ENCODER", fusioner.TEXT_ENCODER, TEXT_ENCODERS)
    text_backbone, text_encoder = build_text(cfg, backbone, cache_dir=text_cache(cfg), templates=templates)
    return {
        "backbone": backbone,
        "text_backbone": text_backbone,
        "text_encoder": text_encoder,
        "fusion": Fusion(
            vision_dim=[*backbone.channels.values()][-1],
            text_dim=text_encoder.dim,
            width=fusioner.WIDTH,
            num_layers=fusioner.LAYERS,
            heads=fusioner.HEADS,
            dropout=fusioner.DROPOUT,
            drop_path_rate=fusioner.DROP_PATH_RATE,
        ),
        "decoder": ConvDecoder(width=fusioner.WIDTH),
        "temperature": fusioner.TEMPERATURE,
        "windows": Windows(fusioner.WINDOW, fusioner.WINDOW_BORDER) if fusioner.WINDOW else None,
        **settings(cfg),
    }


def build_clip_text(cfg: CfgNode, backbone: nn.Module, **options: Any) -> tuple[CLIPBackbone | None, TextEncoder]:
    """CLIP's text tower, that of the vision encoder if it has one."""
    own = None if isinstance(backbone, CLIPBackbone) else build_clip_backbone(cfg, FUSIONER_FAMILIES)
    return own, TextEncoder((own or backbone).clip_model, **options)


def build_bert_text(cfg: CfgNode, backbone: nn.Module, **options: Any) -> tuple[Bert, TextEncoder]:
    """BERT of a local folder."""
    bert = Bert(cfg.MODEL.FUSIONER.BERT)
    return bert, BertTextEncoder(bert, **options)


def build_classifier(cfg: CfgNode, backbone: CLIPBackbone) -> RegionClassifier:
    """The out-of-vocabulary classifier that the config names, by default the one published for the CLIP's family."""
    key = "MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER"
    name = cfg.MODEL.FC_CLIP.OUT_OF_VOCABULARY_CLASSIFIER or backbone.region_classifier
    adapter = cfg.MODEL.MASK_ADAPTER
    return lookup(key, name, OUT_OF_VOCABULARY_CLASSIFIERS)(
        backbone,
        width=adapter.NUM_CHANNELS,
        mask_channels=adapter.MASK_IN_CHANNELS,
        num_maps=adapter.NUM_OUTPUT_MAPS,
        threshold=adapter.MASK_THRESHOLD,
        query_chunk=adapter.QUERY_CHUNK,
    )


def build_output_settings(cfg: CfgNode) -> OutputSettings:
    """How outputs are made; panoptic maps and instances need masks at the output size, and semantic maps use them."""
    test = cfg.MODEL.MASK_FORMER.TEST
    return OutputSettings(
        object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
        overlap_threshold=test.OVERLAP_THRESHOLD,
        topk=cfg.TEST.DETECTIONS_PER_IMAGE,
        masks_first=test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON,
    )


def build_criterion(cfg: CfgNode) -> SetCriterion:
    """The losses with their weights."""
    former = cfg.MODEL.MASK_FORMER
    lookup("SOLVER.CE_NORM", cfg.SOLVER.CE_NORM, dict.fromkeys(("rank", "global")))
    return SetCriterion(
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        class_weight=former.CLASS_WEIGHT,
        mask_weight=former.MASK_WEIGHT,
        dice_weight=former.DICE_WEIGHT,
        no_object_weight=former.NO_OBJECT_WEIGHT,
        num_points=former.TRAIN_NUM_POINTS,
        oversample_ratio=former.OVERSAMPLE_RATIO,
        importance_ratio=former.IMPORTANCE_SAMPLE_RATIO,
        deep_supervision=former.DEEP_SUPERVISION,
        global_class_norm=cfg.SOLVER.CE_NORM == "global",
    )


def build_clip_backbone(cfg: CfgNode, families: Sequence[type[CLIPBackbone]] = FAMILIES) -> CLIPBackbone:
    """The frozen CLIP, as one of these families."""
    fc_clip = cfg.MODEL.FC_CLIP
    return build_clip(
        fc_clip.CLIP_MODEL_NAME, fc_clip.CLIP_PRETRAINED_WEIGHTS, quick_gelu=fc_clip.QUICK_GELU, families=families
    )


def build_fcclip_head(cfg: CfgNode, backbone: Levels) -> FCCLIPHead:
    """Pixel decoder and masked decoder on the backbone's levels."""
    names = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME, cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    decoder = lookup("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", names[0], TRANSFORMER_DECODERS)
    pixel_decoder = lookup("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", names[1], PIXEL_DECODERS)
    check_decoder_input(cfg)
    return FCCLIPHead(pixel_decoder=pixel_decoder(cfg, backbone), predictor=decoder(cfg, backbone))


def check_decoder_input(cfg: CfgNode) -> None:
    """Refuses a MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE that the decoder cannot look at."""
    lookup(
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
        cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE,
        {"multi_scale_pixel_decoder": None},
    )


def build_pixel_decoder(cfg: CfgNode, backbone: Levels) -> MSDeformAttnPixelDecoder:
    """The deformable pixel decoder on the levels that the config names."""
    return MSDeformAttnPixelDecoder(**pixel_decoder_arguments(cfg, backbone))


def pixel_decoder_arguments(cfg: CfgNode, backbone: Levels) -> dict[str, Any]:
    """What `MSDeformAttnPixelDecoder` takes."""
    head = cfg.MODEL.SEM_SEG_HEAD
    for key, names in (
        ("IN_FEATURES", head.IN_FEATURES),
        ("DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES),
    ):
        for name in names:
            lookup(f"backbone level in MODEL.SEM_SEG_HEAD.{key}", name, backbone.channels)
    used = sorted(set(head.IN_FEATURES), key=backbone.strides.get)
    encoder = [name for name in used if name in head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES]
    if len(encoder) != MultiScaleMaskedTransformerDecoder.num_levels:
        raise InputError(
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES must name three of IN_FEATURES, which the "
            f"decoder looks at in turn; got {encoder}"
        )
    if head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS != NUM_POINTS:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS is "
            f"{head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS}, but {NUM_POINTS} points are built, as published"
        )
    finer = [name for name in used if head.COMMON_STRIDE <= backbone.strides[name] < backbone.strides[encoder[0]]]
    if not finer or backbone.strides[finer[0]] != head.COMMON_STRIDE:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {head.COMMON_STRIDE}, but IN_FEATURES has no level of that stride "
            f"finer than {encoder[0]}; the levels have strides { ({name: backbone.strides[name] for name in used}) }"
        )
    return {
        "in_channels": backbone.channels,
        "encoder_levels": encoder,
        "top_down_levels": finer,
        "dim": head.CONVS_DIM,
        "mask_dim": head.MASK_DIM,
        "heads": cfg.MODEL.MASK_FORMER.NHEADS,
        "num_layers": head.TRANSFORMER_ENC_LAYERS,
        "feedforward": head.TRANSFORMER_ENC_DIM_FEEDFORWARD,
        "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
        "norm": head.NORM,
        "engine": select_engine(cfg.MODEL.MSDA_ENGINE, resolve_device(cfg.MODEL.DEVICE)),
        "use_checkpoint": head.USE_CHECKPOINT,
    }


def build_mask_decoder(cfg: CfgNode, backbone: Levels) -> MultiScaleMaskedTransformerDecoder:
    """The masked transformer decoder."""
    return MultiScaleMaskedTransformerDecoder(**mask_decoder_arguments(cfg, embed_dim=backbone.embed_dim))


def mask_decoder_arguments(cfg: CfgNode, *, embed_dim: int) -> dict[str, Any]:
    """What `MultiScaleMaskedTransformerDecoder` takes."""
    former = cfg.MODEL.MASK_FORMER
    return {
        "in_channels": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        "dim": former.HIDDEN_DIM,
        "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        "embed_dim": embed_dim,
        "num_queries": former.NUM_OBJECT_QUERIES,
        "num_layers": former.DEC_LAYERS - 1,
        "heads": former.NHEADS,
        "feedforward": former.DIM_FEEDFORWARD,
        "pre_norm": former.PRE_NORM,
        "enforce_input_proj": former.ENFORCE_INPUT_PROJ,
    }


def frozenseg_parts(cfg: CfgNode) -> dict[str, Any]:
    """What `FrozenSeg` takes besides its vocabularies."""
    backbone = lookup("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONES)(cfg)
    check_embed_dim(cfg, backbone)
    lookup("MODEL.SEM_SEG_HEAD.NAME", cfg.MODEL.SEM_SEG_HEAD.NAME, {"FrozenSegHead": None})
    sam = build_sam_encoder(cfg)
    return {
        "backbone": backbone,
        "sam": sam,
        "openseg": build_openseg(cfg),
        "sem_seg_head": build_frozenseg_head(cfg, backbone, sam),
        **fcclip_arguments(cfg, backbone),
    }


def build_openseg(cfg: CfgNode) -> OpenSegEnsemble | None:
    """The ensemble with SAM's masks; None where the config does not ask for it."""
    test = cfg.TEST
    if not test.USE_SAM_MASKS:
        return None
    if test.AUG.ENABLED:
        raise InputError("TEST.USE_SAM_MASKS and TEST.AUG.ENABLED do not go together: SAM's masks are of whole images")
    folder = Path(test.SAM_MASKS_DIR).expanduser() / test.PKL_SAM_MODEL_NAME
    if not folder.is_dir():
        raise InputError(
            f"TEST.USE_SAM_MASKS: there is no folder '{folder}' (TEST.SAM_MASKS_DIR and TEST.PKL_SAM_MODEL_NAME); "
            "tools/precompute_sam_masks.py makes it"
        )
    return OpenSegEnsemble(folder, test.SAM_MASK_PRED_ALPHA)


def build_sam_encoder(cfg: CfgNode) -> SamImageEncoder | None:
    """The frozen SAM; None where no injector looks at it."""
    model, former = cfg.MODEL, cfg.MODEL.MASK_FORMER
    if former.SAM_QUERY_FUSE_LAYER == former.SAM_FEATURE_FUSE_LAYER == NO_FUSE_LAYER:
        return None
    if cfg.INPUT.FORMAT != "RGB":
        raise InputError(f"INPUT.FORMAT must be RGB for SAM, got {cfg.INPUT.FORMAT}")
    cache_dir = Path(model.SAM_CACHE_DIR).expanduser() if model.SAM_CACHE_DIR else None
    sam = build_sam(model.SAM_NAME, model.SAM_WEIGHTS, resize=model.SAM_RESIZE, cache_dir=cache_dir)
    if sam.channels != former.HIDDEN_DIM:
        raise InputError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM ({former.HIDDEN_DIM}) must equal the channels of SAM '{model.SAM_NAME}' "
            f"({sam.channels}), whose features are added to the queries"
        )
    return sam


def build_frozenseg_head(cfg: CfgNode, backbone: Levels, sam: SamImageEncoder | None) -> FrozenSegHead:
    """FC-CLIP's decoders with what FrozenSeg adds to them, as far as the config turns it on."""
    check_decoder_input(cfg)
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    lookup("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", head.PIXEL_DECODER_NAME, PIXEL_DECODERS)
    lookup("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", former.TRANSFORMER_DECODER_NAME, TRANSFORMER_DECODERS)
    arguments = pixel_decoder_arguments(cfg, backbone)
    if former.SAM_FEATURE_FUSE_LAYER == NO_FUSE_LAYER:
        pixel_decoder = MSDeformAttnPixelDecoder(**arguments)
    else:
        pixel_decoder = FrozenSegPixelDecoder(sam_channels=sam.channels, **arguments)
    predictor = FrozenSegDecoder(
        feature_level=former.SAM_FEATURE_FUSE_LAYER,
        query_level=former.SAM_QUERY_FUSE_LAYER,
        **mask_decoder_arguments(cfg, embed_dim=backbone.embed_dim),
    )
    return FrozenSegHead(pixel_decoder=pixel_decoder, predictor=predictor)


NO_FUSE_LAYER = 3  # of MODEL.MASK_FORMER.SAM_*_FUSE_LAYER
COMPILABLE = {  # name in MODEL.COMPILE -> submodule or method
    "backbone": "backbone",
    "pixel_decoder": "sem_seg_head.pixel_decoder",
    "mask_decoder": "sem_seg_head.predictor",
    "classifier": "pool",  # the out-of-vocabulary one
}
# Published names; one line adds a part.
META_ARCHITECTURES: dict[str, tuple[type[Architecture], Callable[[CfgNode], dict[str, Any]]]] = {
    "FCCLIP": (FCCLIP, fcclip_parts),
    "FrozenSeg": (FrozenSeg, frozenseg_parts),
    "MAFT_Plus": (MAFTPlus, maft_parts),
    "Fusioner": (Fusioner, fusioner_parts),
}
BACKBONES = {"CLIP": build_clip_backbone}
FUSIONER_FAMILIES = (ViTCLIP, *FAMILIES)
VISION_ENCODERS: dict[str, Callable[[CfgNode], CLIPBackbone | TimmViT]] = {
    "CLIP": lambda cfg: build_clip_backbone(cfg, FUSIONER_FAMILIES),
    "timm": lambda cfg: TimmViT(cfg.MODEL.FUSIONER.TIMM_MODEL, cfg.MODEL.FUSIONER.TIMM_WEIGHTS),
}
TEXT_ENCODERS = {"CLIP": build_clip_text, "BERT": build_bert_text}
SEM_SEG_HEADS = {"FCCLIPHead": build_fcclip_head}
PIXEL_DECODERS = {"MSDeformAttnPixelDecoder": build_pixel_decoder}
TRANSFORMER_DECODERS = {"MultiScaleMaskedTransformerDecoder": build_mask_decoder}
