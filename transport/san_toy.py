# SPDX-License-Identifier: Apache-2.0
"""`python -m transport.san_toy`: GAN against SAN on eight Gaussians (san/toy.py)."""
from transport.san.toy import main

if __name__ == "__main__":
    main()
