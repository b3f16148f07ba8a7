# SPDX-License-Identifier: Apache-2.0
"""Directions in the space of w along which pictures change in one way: how they are found, kept and applied."""
