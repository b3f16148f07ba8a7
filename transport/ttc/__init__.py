# SPDX-License-Identifier: Apache-2.0
"""Trust the Critics: no generator, but a sequence of critics that samples follow. The study is in experiment.py."""
