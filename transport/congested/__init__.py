# SPDX-License-Identifier: Apache-2.0
"""Congested transport, which a critic with a gradient penalty computes. The study is in experiment.py."""
