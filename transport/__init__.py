# SPDX-License-Identifier: Apache-2.0
"""What a critic's gradient is: four studies around SAN, and the command that diagnoses a trained discriminator.

`python -m transport.<name>` runs one: `san_toy`, `san_dcgan`, `trust_the_critics`, `congested`, `latent1d`, `diagnose`.
Each study has a folder (san, ttc, congested, latent1d), knows common/ and no other study. docs/transport.md tells what
each shows. Nothing outside this package imports it; what is measured of a discriminator is in
training/watch/discriminator_diagnosis.py.
"""
