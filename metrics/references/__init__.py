# SPDX-License-Identifier: Apache-2.0
"""What generated images are compared with: images, stored statistics of images, or both; and a cache of statistics.

| file | what |
|---|---|
| statistics.py | mean and covariance of a detector's output; the real side of a metric |
| reading.py | files of statistics, ours and foreign ones, told apart by their content |
| limits.py | what such files may say |
| pickles.py | those that are pickles: EDM2's, StyleGAN's cache, torch-fidelity's cache |
| writing.py | our own file: an .npz that other tools' readers take |
| cache.py | what real images gave, kept between runs |
"""
from metrics.references.cache import cache_path as cache_path
from metrics.references.cache import read_cache as read_cache
from metrics.references.cache import write_cache as write_cache
from metrics.references.reading import is_statistics as is_statistics
from metrics.references.reading import load_statistics as load_statistics
from metrics.references.statistics import Reference as Reference
from metrics.references.statistics import Statistics as Statistics
from metrics.references.statistics import check_statistics as check_statistics
from metrics.references.writing import save_statistics as save_statistics
