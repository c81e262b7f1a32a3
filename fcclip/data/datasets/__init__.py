"""One module a family of data sets, and the readers they share.

metadata.py          class_metadata: detectron2's class names and id maps of a vocabulary
files.py             AnnotationFile: a JSON file and what it must have; files of a folder
panoptic.py          panoptic_dataset: COCO panoptic JSON with id PNGs, for every family that has them
semantic.py          semantic_dataset: two folders of images and label maps, paired by file name
instances.py         instance_dataset: COCO instance JSON with polygons or run-length codes
coco.py              COCO 2017: panoptic, instances, COCO-Stuff
ade20k.py            ADE20K: panoptic, instances and semantic with 150 classes, semantic with 847
lvis.py              LVIS v1 instances, whose class names come from the user's JSON
cityscapes.py        Cityscapes
mapillary_vistas.py  Mapillary Vistas v1.2
bdd100k.py           BDD100K: panoptic with 40 classes, semantic with 19
pascal.py            Pascal Context with 59 and 459 classes, Pascal VOC with 20 and 21
shapes.py            the shapes world of this project

A builder takes the root folder, the name and the split, and returns a `Dataset`; it reads no file of the data set.
"""
