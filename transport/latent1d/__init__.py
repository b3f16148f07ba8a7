# SPDX-License-Identifier: Apache-2.0
"""Generators with a one-dimensional latent against the best possible one. The study is in experiment.py."""
