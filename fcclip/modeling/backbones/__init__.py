"""Frozen encoders, one module each.

clip.py         the frozen CLIP: features, weights
fingerprint.py  what a CLIP is and computes, stored beside weights and compared when they are loaded
"""
