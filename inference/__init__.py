# SPDX-License-Identifier: Apache-2.0
"""From a trained generator or from files to images: loading, sampling, reading."""
