# SPDX-License-Identifier: Apache-2.0
"""`python -m transport.trust_the_critics`: samples that follow a sequence of critics (ttc/experiment.py)."""
from transport.ttc.experiment import main

if __name__ == "__main__":
    main()
