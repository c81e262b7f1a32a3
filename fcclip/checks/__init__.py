"""Whether config, weights, vocabulary, data and machine fit together.

dataset.py      check_dataset: everything that can be wrong with the files of a data set
annotations.py  annotation files
images.py       images and label maps, pixel by pixel
findings.py     kinds of findings
processes.py    work in processes that may die
"""
