# SPDX-License-Identifier: Apache-2.0
"""`python -m transport.latent1d`: the command of experiment.py."""
from transport.latent1d.experiment import main

if __name__ == "__main__":
    main()
