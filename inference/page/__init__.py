# SPDX-License-Identifier: Apache-2.0
"""The page in the browser: what its controls mean, what they show, and how it is laid out."""
