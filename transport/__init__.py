# SPDX-License-Identifier: Apache-2.0
"""What a critic's gradient is: four studies around SAN, and the diagnosis of a trained discriminator.

`python -m transport.<name>` runs one: `san_toy`, `diagnose`, `trust_the_critics`, `congested`, `latent1d`.
docs/transport.md tells what each shows. Nothing outside this package imports it,
but train.py, which hands the diagnosis to the loop for --diagnose.
"""
