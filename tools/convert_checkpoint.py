"""Converts files of weights into each other, without losing anything silently.

    python tools/convert_checkpoint.py fcclip_cocopan.pth fcclip.safetensors
    python tools/convert_checkpoint.py fcclip.safetensors fcclip_cocopan.pth --layout published
    python tools/convert_checkpoint.py fcclip_cocopan.pth full.safetensors --layout full \\
        --config-file configs/coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml

INPUT is any file that can be read safely: .pth, .pkl, .safetensors, a TorchScript archive. The suffix of OUTPUT says
what is written: .safetensors, or .pth with the weights under "model" as in the published files. Tensors are kept bit
for bit unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcclip.config import load_config, resolve_file
from fcclip.engine import save_checkpoint
from fcclip.errors import InputError, MissingFileError, run_program
from fcclip.modeling import FCCLIP, build_model
from fcclip.modeling.backbones.clip import CONSTANTS as CLIP_CONSTANTS
from fcclip.modeling.backbones.clip import FROZEN_PREFIX, tag_has_quick_gelu
from fcclip.weights import frozen_notes, load_state, write_safetensors
from fcclip.weights.files import VERSIONS, WeightFile, read_weight_file

LAYOUTS = {
    "published": "all but the CLIP, with the class weights of the loss; as in the published files",
    "trainable": "only what a training changes",
    "full": "everything, with the CLIP",
}
DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUFFIXES = (".pth", ".pt", ".safetensors")
TRAINED = ("sem_seg_head.", "void_embedding.")
SAM_PREFIX = "sam."  # of SAM's weights in a file of FrozenSeg
CLASS_WEIGHTS = "criterion.empty_weight"
VOID = "void_embedding.weight"
TRAINING_STATE = ("optimizer", "scheduler", "scaler", "trainer", "random")
CONSTANTS = ("pixel_mean", "pixel_std", *(FROZEN_PREFIX + name for name in CLIP_CONSTANTS))
CLIP_PARTS = ("visual.", "token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    convert(parse_arguments(argv))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", metavar="INPUT", help="file of weights or checkpoint, or the name of a shipped asset")
    add("output", metavar="OUTPUT", help="file to write: .pth, .pt or .safetensors")
    add(
        "--layout",
        choices=LAYOUTS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items()) + " (default: every tensor of INPUT)",
    )
    add("--config-file", metavar="FILE", help="YAML of the weights: checks them, and supplies what INPUT does not hold")
    add("--dtype", choices=DTYPES, default="keep", help="of the floating-point tensors (default: as they are)")
    add("--weights-only", action="store_true", help="leave out the state of a training (optimizer, scheduler, ...)")
    add("--force", action="store_true", help="overwrite OUTPUT")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys that override the file")
    return parser.parse_intermixed_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Reads, chooses, writes, and says what it did.

    Raises:
        InputError: INPUT cannot be read, lacks something, or would lose something that was not named.
        OSError: INPUT does not exist; OUTPUT exists or cannot be written.
    """
    output = Path(args.output)
    check_output(output, force=args.force)
    if args.opts and not args.config_file:
        raise InputError(f"KEY VALUE needs --config-file (got {' '.join(args.opts)})")
    file = read_weight_file(resolve_file(args.input, what="INPUT"), what="INPUT")
    print(f"read  {args.input}: {file.kind} file, {describe(file.tensors)}{also(file.rest)}")
    model = build(args, file) if args.config_file else None
    tensors, dropped = arrange(file.tensors, args.layout, model)
    added = [name for name in tensors if name not in file.tensors]
    tensors, rounded = in_dtype(tensors, DTYPES[args.dtype])
    rest = notes(file, tensors, model)
    rest, left = without_training(rest, weights_only=args.weights_only, as_json=output.suffix == ".safetensors")
    write(output, tensors, rest, file.versions)
    size = output.stat().st_size / 1e6
    print(f"wrote {args.output}: {describe(tensors)}{also(rest)}; {size:.1f} MB on disk")
    for what, names in (
        ("added from the config", added),
        (f"rounded to {args.dtype}", rounded),
        ("left out", [*dropped, *left]),
    ):
        if names:
            print(f"{what} ({len(names)}): {', '.join(short(names))}")


def check_output(output: Path, *, force: bool) -> None:
    """Refuses an output that could not or must not be written, before anything is read."""
    if output.suffix not in SUFFIXES:
        raise InputError(f"OUTPUT must end in {', '.join(SUFFIXES)}, got '{output}'")
    if output.is_dir():
        raise IsADirectoryError(f"OUTPUT '{output}' is a folder; give the name of a file")
    if not output.parent.is_dir():
        raise MissingFileError(f"the folder of OUTPUT, '{output.parent}', does not exist")
    if output.exists() and not force:
        raise FileExistsError(f"OUTPUT '{output}' exists; it is overwritten with --force only")


def build(args: argparse.Namespace, file: WeightFile) -> FCCLIP:
    """The model of the config with the weights of the file in it, which proves that they fit."""
    overrides = [*args.opts, "MODEL.DEVICE", "cpu"]
    if not missing_clip_parts(file.tensors):  # the config's CLIP is neither read nor downloaded: the file replaces it
        fc_clip = load_config(args.config_file, overrides).MODEL.FC_CLIP
        by_tag = tag_has_quick_gelu(fc_clip.CLIP_MODEL_NAME, fc_clip.CLIP_PRETRAINED_WEIGHTS)
        overrides += ["MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS", ""]
        overrides += ["MODEL.FC_CLIP.QUICK_GELU", "on"] if by_tag and fc_clip.QUICK_GELU == "auto" else []
    model = build_model(load_config(args.config_file, overrides))
    load_state(model, file.tensors, source=args.input, notes=file.rest)
    return model


def arrange(
    tensors: Mapping[str, Tensor], layout: str | None, model: FCCLIP | None
) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of a layout, names that were left out). What the file lacks comes from the model.

    Raises:
        InputError: no weights of FC-CLIP, or something that the layout needs is nowhere.
    """
    if layout is None:
        return dict(tensors), []
    known = (*TRAINED, FROZEN_PREFIX, SAM_PREFIX, CLASS_WEIGHTS, *CONSTANTS)
    unknown = [name for name in tensors if not name.startswith(known)]
    if unknown or VOID not in tensors:
        reason = f"it holds '{unknown[0]}'" if unknown else f"it lacks '{VOID}'"
        raise InputError(f"--layout {layout} is for weights of FC-CLIP, which INPUT does not hold: {reason}")
    own = model.state_dict() if model is not None else {}
    chosen = {name: value for name, value in tensors.items() if name.startswith(TRAINED)}
    if layout != "trainable":
        chosen |= {CLASS_WEIGHTS: class_weights(tensors, own, layout)}
    if layout == "full":
        chosen |= whole_clip(tensors, own, model) | whole_sam(tensors, own, model)
    return chosen, [name for name in tensors if name not in chosen]


def class_weights(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], layout: str) -> Tensor:
    """The class weights of the file, else those of the config."""
    if CLASS_WEIGHTS not in tensors and CLASS_WEIGHTS not in own:
        raise InputError(
            f"--layout {layout} needs '{CLASS_WEIGHTS}', which INPUT does not hold; give the --config-file of the "
            "weights, which says how many classes they were trained with"
        )
    return tensors.get(CLASS_WEIGHTS, own.get(CLASS_WEIGHTS))


def whole_clip(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], model: FCCLIP | None) -> dict[str, Tensor]:
    """Every tensor of the CLIP: those of the file, the others from the config."""
    held = {name: value for name, value in tensors.items() if name.startswith(FROZEN_PREFIX) and name not in CONSTANTS}
    absent = missing_clip_parts(tensors)
    if model is None and absent:
        raise InputError(
            f"--layout full needs the CLIP, of which INPUT lacks {', '.join(absent)}; give the --config-file of the "
            "weights, which says what CLIP they were trained on"
        )
    if model is not None and model.backbone.has_random_weights:
        raise InputError(
            "--layout full needs the CLIP, but that of the config has random weights; set "
            "MODEL.FC_CLIP.CLIP_PRETRAINED_WEIGHTS"
        )
    return held | {name: value for name, value in own.items() if name.startswith(FROZEN_PREFIX) and name not in held}


def missing_clip_parts(tensors: Mapping[str, Tensor]) -> list[str]:
    return [part for part in CLIP_PARTS if not any(name.startswith(FROZEN_PREFIX + part) for name in tensors)]


def whole_sam(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], model: FCCLIP | None) -> dict[str, Tensor]:
    """Every tensor of the SAM of FrozenSeg: those of the file, else those of the config."""
    held = {name: value for name, value in tensors.items() if name.startswith(SAM_PREFIX)}
    needed = any("_attention_layers_sam." in name for name in tensors)
    sam = getattr(model, "sam", None)
    if needed and not held and (sam is None or sam.has_random_weights):
        raise InputError(
            "--layout full needs SAM, which INPUT does not hold; give the --config-file of the weights, whose "
            "MODEL.SAM_WEIGHTS names it"
        )
    return held or {name: value for name, value in own.items() if name.startswith(SAM_PREFIX)}


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors in that dtype, names of those that lost digits).

    Raises:
        InputError: a number would become infinite.
    """
    if dtype is None:
        return dict(tensors), []
    converted, rounded = {}, []
    for name, value in tensors.items():
        converted[name] = value.to(dtype) if value.is_floating_point() else value
        if converted[name] is value or torch.equal(converted[name].to(value.dtype), value):
            continue
        if (converted[name].isinf() & value.isfinite()).any():
            raise InputError(f"'{name}' has numbers too large for --dtype {str(dtype).removeprefix('torch.')}")
        rounded.append(name)
    return converted, rounded


def notes(file: WeightFile, tensors: Mapping[str, Tensor], model: FCCLIP | None) -> dict[str, Any]:
    """What is stored beside the weights: the file's notes, and on the CLIP what the file alone would not tell."""
    holds_clip = any(name.startswith(FROZEN_PREFIX) for name in tensors)
    stored = file.rest.get("clip")
    if model is not None and holds_clip and not isinstance(stored, Mapping):  # nothing, or the hash of earlier files
        return {**file.rest, **frozen_notes(model)}
    if not stored and file.kind == "torchscript" and any(name.startswith("visual.") for name in tensors):
        return {**file.rest, "clip": {"quick_gelu": True}}  # OpenAI's, which alone are published so
    return file.rest


def without_training(rest: Mapping[str, Any], *, weights_only: bool, as_json: bool) -> tuple[dict[str, Any], list[str]]:
    """(entries that are stored beside the weights, names of those left out).

    Raises:
        InputError: entries that safetensors cannot hold, and nobody said that they may go.
    """
    state = [name for name, value in rest.items() if (as_json and not is_json(value))]
    if state and not weights_only:
        raise InputError(
            f"INPUT holds the state of a training ({', '.join(state)}), which .safetensors cannot hold: write .pth, or "
            "leave it out with --weights-only"
        )
    left = [name for name in rest if weights_only and (name in state or name in TRAINING_STATE)]
    return {name: value for name, value in rest.items() if name not in left}, left


def is_json(value: Any) -> bool:
    """Whether JSON gives a value back as it was."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def write(output: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], versions: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    odd = [name for name, value in tensors.items() if value.layout is not torch.strided or value.is_quantized]
    if odd:
        raise InputError(f"'{odd[0]}' is a sparse or quantised tensor; only plain ones can be converted")
    if output.suffix == ".safetensors":
        write_safetensors(output, tensors, {**rest, **({VERSIONS: dict(versions)} if versions else {})})
        return
    if "model" in rest:
        raise InputError("INPUT has a note called 'model', which is where .pth holds the weights")
    state = OrderedDict((name, value.clone(memory_format=torch.contiguous_format)) for name, value in tensors.items())
    if versions:
        state._metadata = OrderedDict(versions)
    save_checkpoint(output, {"model": state, **rest})


def describe(tensors: Mapping[str, Tensor]) -> str:
    """Counts, size, dtypes and layout in a few words."""
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    clip = sum(name.startswith(FROZEN_PREFIX) and name not in CONSTANTS for name in tensors)
    if VOID not in tensors:
        layout = "no weights of FC-CLIP"
    elif clip:
        layout = f"full layout ({clip} tensors of the CLIP)"
    else:
        layout = "published layout" if CLASS_WEIGHTS in tensors else "trainable layout"
    size = sum(value.numel() * value.element_size() for value in tensors.values()) / 1e6
    return f"{len(tensors)} tensors, {size:.1f} MB, {', '.join(dtypes)}, {layout}"


def also(rest: Mapping[str, Any]) -> str:
    """The names of what stands beside the weights."""
    return f"; with {', '.join(rest)}" if rest else ""


def short(names: Sequence[str]) -> list[str]:
    """The names, those of the CLIP together."""
    clip = [name for name in names if name.startswith(FROZEN_PREFIX)]
    if len(clip) < 9:
        return list(names)
    return [name for name in names if name not in set(clip)] + [f"{FROZEN_PREFIX}* ({len(clip)})"]


if __name__ == "__main__":
    sys.exit(run_program(main))
