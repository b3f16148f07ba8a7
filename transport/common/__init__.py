# SPDX-License-Identifier: Apache-2.0
"""Shared by all studies: their command line, figures, critics with a gradient penalty, and exact optimal transport."""
