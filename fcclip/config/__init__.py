"""Every configuration key with its default and meaning; loading, overrides and validation.

defaults.py  get_cfg: the whole tree; each key is commented where it is defined, and marked with what it affects
marks.py     the marks that defaults.py sets
facts.py     affects, keys_that, why_without_effect: the marks, asked for; flatten: a tree as "KEY.OF.LEAF" -> value
loading.py   load_config, config_of, with_values: YAML with _BASE_, KEY VALUE overrides, errors that help
lookup.py    lookup: the one place where a name from a config becomes code; nearest: did you mean
files.py     resolve_file, find_config, resolve_device, cache_folder: where files are and what a config's paths mean
"""

from fcclip.config.defaults import get_cfg
from fcclip.config.facts import affects, flatten, keys_that, why_without_effect
from fcclip.config.files import assets_dir, cache_folder, configs_dir, find_config, resolve_device, resolve_file
from fcclip.config.loading import config_of, keys_without_effect, load_config, told_without_effect, with_values
from fcclip.config.lookup import lookup, nearest

__all__ = [
    "affects",
    "assets_dir",
    "cache_folder",
    "config_of",
    "configs_dir",
    "find_config",
    "flatten",
    "get_cfg",
    "keys_that",
    "keys_without_effect",
    "load_config",
    "lookup",
    "nearest",
    "resolve_device",
    "resolve_file",
    "told_without_effect",
    "why_without_effect",
    "with_values",
]
