# SPDX-License-Identifier: Apache-2.0
"""Reading data sets: folders, archives and their indices, labels, PNG files, random orders."""
