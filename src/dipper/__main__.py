"""`python -m dipper`: the same as the `dipper` command."""

from __future__ import annotations

import sys

from dipper.cli import main

if __name__ == "__main__":
    sys.exit(main())
