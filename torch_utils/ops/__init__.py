# SPDX-License-Identifier: Apache-2.0
"""Signal-processing operations of the networks. `dispatch` decides which implementation of each runs."""
