# SPDX-License-Identifier: Apache-2.0
"""`python -m transport.san_dcgan`: a DCGAN and the same as SAN on handwritten digits (san/dcgan.py)."""
from transport.san.dcgan import main

if __name__ == "__main__":
    main()
