"""What an experiment can measure: each kind of cell by its name, its options, and the function that measures one.

    record = KINDS["perplexity"].measure({"method": {"name": "dip"}, "density": 0.6, "tokens": 8192}, context)

A measurement is a function of its options and a `Context` alone, and gives JSON types. Loaded models stay in the
process, so that cells of one model that follow each other load it once. PyTorch is imported by the kinds that need it.
"""

from dipper.kinds.benchmarked import BENCHMARK
from dipper.kinds.compensated import COMPENSATION
from dipper.kinds.evaluated import PERPLEXITY, TASKS
from dipper.kinds.kind import Context, Kind, data_files
from dipper.kinds.simulated import SIMULATE

__all__ = ["KINDS", "Context", "Kind", "data_files"]

KINDS: dict[str, Kind] = {kind.name: kind for kind in (PERPLEXITY, TASKS, COMPENSATION, SIMULATE, BENCHMARK)}
