"""Frozen encoders, one module each.

clip.py         the frozen CLIP: features, weights
bert.py         a text encoder that never saw an image
vit.py          vision transformers: CLIP's, and timm's without a text tower
sam.py          the frozen image encoder of SAM: features, weights
casting.py      a low-precision copy of a frozen tower, for training under autocast
fingerprint.py  what a CLIP is and computes, stored beside weights and compared when they are loaded
"""
