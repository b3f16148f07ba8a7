# SPDX-License-Identifier: Apache-2.0
"""What every torch program here shares: processes, statistics, checkpoints, custom operations."""
