# SPDX-License-Identifier: Apache-2.0
"""One optimiser step: what goes in, gradients, their guard, averages. Nothing here knows a folder."""
