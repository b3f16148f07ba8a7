# SPDX-License-Identifier: Apache-2.0
"""Data sets for training out of whatever holds images: sources, transforms, writing, checking. No torch."""
