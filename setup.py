"""Package layout; everything else stands in pyproject.toml.

`configs/` lies at the root of the repository, where users of detectron2 projects look for it, and is installed as the
package data of `fcclip.configs`.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
yaml_files = [str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")]

setup(
    packages=[*find_packages(include=["fcclip", "fcclip.*"]), "fcclip.configs"],
    package_dir={"fcclip.configs": "configs"},
    package_data={
        "fcclip": [
            "assets/*.json",
            "assets/*.safetensors",
            "vocabulary/names/*.json",
            "evaluation/*.json",
            "ops/csrc/*",
        ],
        "fcclip.configs": yaml_files,
    },
)
