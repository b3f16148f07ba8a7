# SPDX-License-Identifier: Apache-2.0
"""Image-quality metrics: feature statistics, distances between them, and the protocols that carry their names."""
