"""dipper: run GLU language models larger than the DRAM they may use, streamed from flash by weight columns."""

from __future__ import annotations

__version__ = "0.1.0"
