"""From files on the disk to batches for the model.

catalog.py       DATASETS, get_dataset: every data set by name
own_data.py      own_dataset: what a YAML file of the user describes
dataset.py       Dataset: what the catalog holds; joined: several to train on
datasets/        one module a family of data sets, and the readers they share
images.py        reading images, id PNGs and label maps, with errors that name the file
segmentations.py polygons and run-length codes to masks, segments to classes
transforms.py    geometry of the published augmentations and of the test-time resize
color_jitter.py  colour augmentation
mappers.py       from a record to a sample, for training and for testing
samplers.py      which record comes when
transport.py     how records and batches travel between processes
vocabularies.py  dataset_vocabulary: the words of a data set
training_set.py  training_set, training_vocabulary: what a config trains on
loaders.py       build_train_loader, build_test_loader
replay.py        build_replay_loader: former images among the new ones
shapes_world.py  renderer of the shapes world
checker.py       check_dataset: everything that can be wrong with the files of a data set; its parts are
                 checker_findings.py, checker_annotations.py, checker_images.py and checker_processes.py
preparation.py, preparation_files.py  what the programs datasets/prepare_*.py share
"""

from fcclip.data.catalog import DATASETS, Dataset, distinct_datasets, get_dataset, root_folder
from fcclip.data.dataset import joined
from fcclip.data.images import image_size, read_id_map, read_image, read_label_map
from fcclip.data.loaders import TestLoader, TrainLoader, build_test_loader, build_train_loader
from fcclip.data.mappers import MAPPERS, build_test_mapper, build_train_mapper
from fcclip.data.own_data import is_own_data, own_dataset
from fcclip.data.samplers import inference_share
from fcclip.data.segmentations import paint_classes
from fcclip.data.transforms import LargeScaleJitter, resize_image, shortest_edge_size
from fcclip.data.vocabularies import dataset_vocabulary

__all__ = [
    "DATASETS",
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
