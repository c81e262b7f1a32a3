"""Every configuration key with its default and meaning; loading, overrides and validation.

defaults.py  get_cfg: the whole tree, each key commented where it is defined; the keys that have no effect
loading.py   load_config: YAML with _BASE_, KEY VALUE overrides, did-you-mean and wrong-type errors
lookup.py    lookup: the one place where a name from a config becomes code; nearest: did you mean
files.py     resolve_file, find_config, resolve_device, cache_folder: where files are and what a config's paths mean
"""

from fcclip.config.defaults import WITHOUT_EFFECT, get_cfg
from fcclip.config.files import assets_dir, cache_folder, configs_dir, find_config, resolve_device, resolve_file
from fcclip.config.loading import keys_without_effect, load_config
from fcclip.config.lookup import lookup, nearest

__all__ = [
    "WITHOUT_EFFECT",
    "assets_dir",
    "cache_folder",
    "configs_dir",
    "find_config",
    "get_cfg",
    "keys_without_effect",
    "load_config",
    "lookup",
    "nearest",
    "resolve_device",
    "resolve_file",
]
