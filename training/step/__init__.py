# SPDX-License-Identifier: Apache-2.0
"""One optimiser step: its micro-batches, its gradients and their guard, and the averages. No module knows a folder."""
