# SPDX-License-Identifier: Apache-2.0
"""What surrounds the generator: layer tables, and growing a stage on a stem."""
