# SPDX-License-Identifier: Apache-2.0
"""A run: its folder, what it begins with, what it writes and how it is continued."""
