"""Weights found by name, path or hub id with their config, and written so that they are found again."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from fvcore.common.config import CfgNode

from fcclip.config import assets_dir, config_of, flatten, get_cfg, keys_that, load_config, lookup, resolve_file
from fcclip.data import DATASETS
from fcclip.errors import InputError, MissingFileError, NotReachableError
from fcclip.files import listed, write_atomically
from fcclip.modeling import Architecture
from fcclip.version import __version__
from fcclip.vocabulary import Vocabulary
from fcclip.weights import (
    FORMER,
    frozen_notes,
    frozen_parts,
    model_weights,
    read_weight_file,
    trained_vocabulary,
    vocabulary_note,
    write_safetensors,
)

SHIPPED = {"shapes": ("shapes/fcclip_shapes.yaml", "shapes_fcclip.safetensors")}  # name -> config file, weights
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"  # of a folder, here and on the hub
_IN_FOLDER = (WEIGHTS, "best.pth", "model_final.pth")  # what a folder is taken to mean, the first that is there
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?")
_TEST = "test_vocabulary"  # note on the classes of a call that brings none


@dataclass(frozen=True)
class Parts:
    """What a segmenter is made of; vocabularies that are None are those of the config's data sets."""

    cfg: CfgNode
    weights: Path
    train_vocabulary: Vocabulary | None = None
    test_vocabulary: Vocabulary | None = None


def find(name: str | Path, *, config: str | Path | None, revision: str | None) -> Parts:
    """See `Segmenter.from_pretrained`."""
    if str(name) in SHIPPED:
        own_config, weights = SHIPPED[str(name)]
        return Parts(load_config(config or own_config), resolve_file(weights))
    path = _path(str(name), revision)
    if path.is_dir():
        beside = path / CONFIG
        config = config or (beside if beside.is_file() else None)
        weights = next((path / file for file in _IN_FOLDER if (path / file).is_file()), None)
        if weights is None:
            raise MissingFileError(f"folder '{name}' holds none of {', '.join(_IN_FOLDER)}; give the path of a file")
        path = weights
    notes = read_weight_file(path).rest
    if config is not None:
        cfg = load_config(config)
    elif notes.get("config"):
        cfg = _noted_config(notes["config"], source=str(path))
    else:
        raise InputError(
            f"'{path}' does not say which config it belongs to, as published files do not; give it: "
            'from_pretrained(…, config="coco/panoptic-segmentation/fcclip/fcclip_convnext_large_eval_ade20k.yaml")'
        )
    train = {"vocabulary": notes["vocabulary"]} if notes.get("vocabulary") else {}
    test = {"vocabulary": notes[_TEST]} if notes.get(_TEST) else {}
    return Parts(_with_files_of(cfg, path.parent), path, trained_vocabulary(train), trained_vocabulary(test))


def _path(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    match = _HUB_ID.fullmatch(name)
    if path.exists():
        return path
    if match is None or (match[2] is None and name.endswith(_SUFFIXES)):
        if "/" in name or name.endswith(_SUFFIXES):
            raise MissingFileError(f"weights '{name}' not found: no such file or folder (looked at {path.absolute()})")
        lookup("pretrained segmenter", name, SHIPPED)
    repo, file = match.groups()
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS, CONFIG, "*.json"])
        )
    except Exception as error:  # whatever stands between here and the hub has errors of its own
        raise NotReachableError(
            f"'{name}' is no folder here, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Is the name right? Without a network, download it elsewhere with "
            f"`hf download {repo}` and give the path of the folder."
        ) from error


def _noted_config(note: Any, *, source: str) -> CfgNode:
    """The config that stands inside a file of weights: the tree, its YAML, or the name of a shipped file."""
    tree = yaml.safe_load(note) if isinstance(note, str) else note
    return config_of(tree, where=source) if isinstance(tree, Mapping) else load_config(str(tree))


def _with_files_of(cfg: CfgNode, folder: Path) -> CfgNode:
    """The same config, with the descriptions of architectures that lie beside the weights."""
    beside = {
        key: str(folder / value)
        for key, value in flatten(cfg).items()
        if isinstance(value, str)
        and value.endswith(".json")
        and Path(value).name == value
        and (folder / value).is_file()
    }
    return config_of({**flatten(cfg), **beside}, where=str(folder)) if beside else cfg


# ---- writing ----


def save(model: Architecture, cfg: CfgNode, folder: Path, *, results: Mapping[str, Any]) -> Path:
    """See `Segmenter.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg, files, is_whole = _for_others(model, cfg)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    notes: dict[str, Any] = {"format": "pt", "fcclip": __version__, "config": cfg.dump(), **frozen_notes(model)}
    trained, seen = model.train_vocabulary, model.seen_vocabulary
    if trained is not None:
        notes["vocabulary"] = vocabulary_note(trained)
    if seen is not None and seen is not trained:
        notes[FORMER] = vocabulary_note(seen)
    if model.test_vocabulary is not None:
        notes[_TEST] = vocabulary_note(model.test_vocabulary)
    write_safetensors(folder / WEIGHTS, model_weights(model, full=is_whole), notes)
    for name, text in ((CONFIG, cfg.dump()), (CARD, card(model, results))):
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    return folder


def push(
    model: Architecture, cfg: CfgNode, repo_id: str, *, results: Mapping[str, Any], private: bool, token: str | None
) -> str:
    """See `Segmenter.push_to_hub`."""
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(model, cfg, Path(folder), results=results)
        try:
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"fcclip {__version__}")
        except Exception as error:
            raise NotReachableError(
                f"'{repo_id}' could not be put on the Hugging Face hub ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}). Are you logged in (`hf auth login`), and may you write there?"
            ) from error
    return str(address)


def _for_others(model: Architecture, cfg: CfgNode) -> tuple[CfgNode, list[Path], bool]:
    """What of a config decides predictions, without what only this machine has; the descriptions of architectures to
    put beside it; and whether frozen weights must go into the file, because nothing that others have holds them."""
    values, defaults = flatten(cfg), flatten(get_cfg())
    kept = {key: values[key] for key in keys_that("decides_predictions")}
    kept |= {
        f"DATASETS.{name}": [data for data in values[f"DATASETS.{name}"] if data in DATASETS]
        for name in ("TRAIN", "TEST")
    }
    files, is_whole = [], False
    for part in frozen_parts(model).values():
        architecture, weights = part.config_keys[0], part.config_keys[-1]
        kept |= {key: values[key] for key in part.config_keys}
        if values[architecture].endswith(".json") and not _is_shipped(values[architecture]):
            files.append(Path(values[architecture]).expanduser())
            kept[architecture] = files[-1].name
        if not values[weights] or (Path(values[weights]).expanduser().exists() and not _is_shipped(values[weights])):
            kept[weights], is_whole = "", True
    changed = {key: value for key, value in kept.items() if value != defaults[key]}
    return config_of(changed, where="config"), files, is_whole


def _is_shipped(name: str) -> bool:
    return Path(name).name == name and (assets_dir() / name).is_file()


def card(model: Architecture, results: Mapping[str, Any]) -> str:
    """The model card."""
    lines = [
        *(
            "---",
            "library_name: fcclip",
            "pipeline_tag: image-segmentation",
            "tags: [open-vocabulary, panoptic]",
            "---",
        ),
        *("", f"# {type(model).__name__}", "", "Segments images with any class names.", "", "```python"),
        *("from fcclip import Segmenter", "", 'segmenter = Segmenter.from_pretrained("owner/name")'),
        *('result = segmenter("photo.jpg", vocabulary="sea; surfboard, surf board; sand:stuff")', "```", ""),
    ]
    for what, vocabulary in (("Trained on", model.train_vocabulary), ("Seen", model.seen_vocabulary)):
        if vocabulary is not None:
            names = listed(vocabulary.class_names, 20)
            lines.append(
                f"- {what} the {len(vocabulary)} classes of '{vocabulary.name}' ({vocabulary.hash[:12]}): {names}"
            )
    for name, note in frozen_notes(model).items():
        about = ", ".join(
            f"{key} {value}" for key, value in note.items() if isinstance(value, (str, bool)) and value != ""
        )
        lines.append(f"- Frozen {name.upper()}: {about}")
    if results:
        lines += ["", "| data set | task | metric | % |", "|---|---|---|--:|"]
        lines += [
            f"| {name} | {task} | {metric} | {value:.1f} |"
            for name, tasks in results.items()
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
            if isinstance(value, (int, float))
        ]
    return "\n".join([*lines, ""])
