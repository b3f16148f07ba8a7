# SPDX-License-Identifier: Apache-2.0
"""A trained generator for other programs and other people: official names, ONNX, a folder for the Hugging Face hub."""
