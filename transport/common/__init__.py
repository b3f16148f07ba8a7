# SPDX-License-Identifier: Apache-2.0
"""What all studies share: their command line, figures, critics with a gradient penalty, and exact optimal transport."""
