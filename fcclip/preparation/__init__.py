"""What the programs `datasets/prepare_*.py` share.

programs.py         Preparation, run: downloads to check, parts to make, files to collect; resumes after a kill
files.py            pixels, id colours, atomic writing
folds.py            lists of PASCAL-5^i and COCO-20^i
shapes_world.py     renderer of the shapes world
shapes_training.py  what `tools/train_shapes_*.py` share: rendered images in memory, weights in half precision
"""
