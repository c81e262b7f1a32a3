"""Open-vocabulary segmentation with one frozen CLIP.

    from fcclip import Segmenter
    result = Segmenter.from_pretrained("shapes")("photo.jpg", words="red circle; blue star, azure star; sand:stuff")

`import fcclip` alone is quick: PyTorch and the rooms are imported when `Segmenter` is first used.
"""

from fcclip.version import __version__

__all__ = ["Segmenter", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Segmenter":
        from fcclip.segmenter import Segmenter

        return Segmenter
    raise AttributeError(f"module 'fcclip' has no attribute '{name}'")
