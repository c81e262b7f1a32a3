"""Whether config, weights, vocabulary, data and machine fit together: before a GPU is taken.

issue.py        Issue, Issues: what a check has to say, and the list that collects it
kinds.py        what can be wrong with the files of a data set
printing.py     issues and progress on a terminal

run.py          check_run: everything that a run would find out later, by
machine.py      device, operators, output folder, disk
weights.py      the model on the meta device, and MODEL.WEIGHTS
vocabulary.py   vocabularies of data sets and weights
frozen.py       the weights of the frozen encoders: a file, or the tag of a CLIP
training.py     settings of training and evaluation
data.py         data sets as a run reads them

dataset.py      check_dataset: every file of a data set, by
annotations.py  annotation files
names.py        names of classes that cannot be told apart
images.py       images and labels, pixel by pixel
report.py       what a data set holds, as a record and in print
preview.py      a sheet of images with their labels
"""
