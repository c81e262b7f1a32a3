"""Where shipped files and the user's cache are, and what the paths and devices of a config mean."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch

from fcclip.errors import InputError, MissingFileError

_PACKAGE = Path(__file__).resolve().parent.parent


def assets_dir() -> Path:
    """The folder of weights and architectures that come with the package."""
    return _PACKAGE / "assets"


def configs_dir() -> Path:
    """The folder of the shipped YAML files: beside the package in a checkout, inside it when installed."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def resolve_file(name: str | Path, *, what: str = "file") -> Path:
    """The file that `name` means: as given (`~` expanded, relative to the working directory), else a shipped asset.

    Raises:
        FileNotFoundError: neither exists; the message names both places and the shipped files.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    asset = assets_dir() / name
    if asset.is_file():
        return asset
    shipped = ", ".join(
        sorted(path.name for path in assets_dir().glob("*.*") if path.suffix in (".json", ".safetensors"))
    )
    raise MissingFileError(
        f"{what} '{name}' not found: there is no such file (looked at {given.absolute()}) and no shipped asset of that "
        f"name (shipped: {shipped or 'none'}). Give the path of an existing file."
    )


def find_config(name: str | Path) -> Path:
    """The YAML file that `name` means: as given, with or without a leading `configs/`, else below the shipped configs.

    Raises:
        FileNotFoundError: no such file; the message names the nearest shipped ones.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    root = configs_dir()
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("configs",) else given
    if not given.is_absolute() and (root / relative).is_file():
        return root / relative
    shipped = {str(path.relative_to(root)): path for path in root.rglob("*.yaml")}
    by_name = {path.name: relative for relative, path in shipped.items()}
    close = difflib.get_close_matches(given.name, by_name, n=3)
    hint = f" Did you mean {' or '.join(repr(by_name[file_name]) for file_name in close)}?" if close else ""
    raise MissingFileError(
        f"config file '{name}' not found (looked at {given.absolute()} and below the shipped configs folder).{hint}"
    )


def cache_folder(part: str = "") -> Path:
    """The user's folder for what can be made again, or that of a part of it: $XDG_CACHE_HOME/fcclip, else
    ~/.cache/fcclip. It is not made here."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fcclip" / part


def resolve_device(name: str) -> torch.device:
    """The device that MODEL.DEVICE names; `auto` is the first of cuda, mps and cpu that this machine has.

    Raises:
        ValueError: a device that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)
    if not available():
        raise InputError(
            f"MODEL.DEVICE is '{name}', but torch {torch.__version__} sees no such device here. Use 'auto' or 'cpu'."
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise InputError(f"MODEL.DEVICE is '{name}', but this machine has {torch.cuda.device_count()} GPU(s)")
    return device
