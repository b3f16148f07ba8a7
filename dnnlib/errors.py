# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """Wrong input. Scripts print the message as one line and exit with `exit_code`.

    The message names the flag or file, the value that was found, and the remedy.
    """

    exit_code = 2


class StoppedEarly(UserError):
    """Somebody asked to stop, and it could not be done in order: what was saved before counts. Start again."""

    exit_code = 3
