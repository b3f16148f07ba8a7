# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself: status lines, curves, verdicts, report.html."""
