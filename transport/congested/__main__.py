# SPDX-License-Identifier: Apache-2.0
"""`python -m transport.congested`: the command of experiment.py."""
from transport.congested.experiment import main

if __name__ == "__main__":
    main()
