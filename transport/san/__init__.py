# SPDX-License-Identifier: Apache-2.0
"""SAN on small GANs: eight Gaussians (toy.py) and handwritten digits (dcgan.py)."""
