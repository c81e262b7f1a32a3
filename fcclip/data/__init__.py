"""From files on the disk to batches for the model.

catalog.py          DATASETS, get_dataset: every data set by name
dataset.py          Dataset: everything that is known of a data set; joined: several to train on
datasets/           one module a family of data sets, and the readers they share
own_data.py         own_dataset: what a YAML file of the user describes
own_description.py  the keys and the classes of such a file
own_categories.py   category ids of a user's COCO JSON, matched to the classes by name
annotations.py      the one entry for COCO annotations: what can be used, and what is wrong with the rest
images.py           reading images, id PNGs and label maps, with errors that name the file
segmentations.py    polygons and run-length codes to masks, segments to classes
transforms.py       geometry of the published augmentations and of the test-time resize
color_jitter.py     colour augmentation
pair_augmentation.py  that of Fusioner: crop, colours, noise, flip, warps
mappers.py          from a record to a sample, for training and for testing
samplers.py         which record comes when
transport.py        how records and batches travel between processes
vocabularies.py     dataset_vocabulary: the class names and synonyms of a data set
training_set.py     training_set, training_vocabulary: what a config trains on
loaders.py          build_train_loader, build_test_loader
"""

from fcclip.data.catalog import DATASETS, Dataset, distinct_datasets, get_dataset, root_folder
from fcclip.data.dataset import EVALUATORS, joined
from fcclip.data.images import image_size, read_id_map, read_image, read_label_map
from fcclip.data.loaders import TestLoader, TrainLoader, build_test_loader, build_train_loader
from fcclip.data.mappers import MAPPERS, build_test_mapper, build_train_mapper
from fcclip.data.own_data import own_dataset
from fcclip.data.own_description import is_own_data
from fcclip.data.samplers import inference_share
from fcclip.data.segmentations import paint_classes
from fcclip.data.transforms import LargeScaleJitter, resize_image, shortest_edge_size
from fcclip.data.vocabularies import dataset_vocabulary

__all__ = [
    "DATASETS",
    "EVALUATORS",
    "MAPPERS",
    "Dataset",
    "LargeScaleJitter",
    "TestLoader",
    "TrainLoader",
    "build_test_loader",
    "build_test_mapper",
    "build_train_loader",
    "build_train_mapper",
    "dataset_vocabulary",
    "distinct_datasets",
    "get_dataset",
    "image_size",
    "inference_share",
    "is_own_data",
    "joined",
    "own_dataset",
    "paint_classes",
    "read_id_map",
    "read_image",
    "read_label_map",
    "resize_image",
    "root_folder",
    "shortest_edge_size",
]
