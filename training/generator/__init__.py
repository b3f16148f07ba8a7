# SPDX-License-Identifier: Apache-2.0
"""Modules around the generator: layer tables, growing a stage on a stem, and images to look at."""
