# SPDX-License-Identifier: Apache-2.0
"""From a picture to the latents that a generator makes it of, and to a generator that was tuned to it."""
