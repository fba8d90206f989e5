"""Pruning rules for GLU MLPs, in PyTorch: which columns a token uses, and what the others are replaced by.

A method is one class that sees one layer's weights (`Glu`) and the layer's inputs. It may look at calibration tokens
first (`collect`, then `fit`), and then maps inputs to outputs with its masks, metering the weights it touched. Adding a
rule is one class and one line in `METHODS`; `dipper.sparsify` puts it into a model, and the tests pick it up from the
registry.

    rule = METHODS["dip"](MethodConfig("dip", density=0.6), glu, layer=0)
    y = rule(x)                      # x [..., D] -> y [..., D]
    rule.meter.touched               # share of the layer's MLP weight bits that a token touched: 0.6

Equal bytes: `density` is the share of the dense MLP's weight bits that a token touches, whatever the rule. DIP touches
(2 d_in + d_glu) / 3 of them (arXiv 2412.01380), a rule that must read W_up whole to choose touches a third and twice
its columns' share of the rest, and so on: each class says how its own densities follow. Weights beyond the model's that
a rule needs (predictors, low-rank factors, masks of fixed patterns) count as touched where a token reads them, and as
`extra_dram_bits` where they must be held.

Selection is `dipper.selector`'s, which follows the engine to the digit.
"""

from __future__ import annotations

from dipper.methods.cached import CachedMethod
from dipper.methods.dip import Dip, DipCacheAware, DipLowRank, DipRescale
from dipper.methods.fixed_masks import Magnitude, SparseGpt, Wanda
from dipper.methods.glu_columns import DejaVu, GatePruning, GluDown, GluOracle, UpPruning
from dipper.methods.linears import PrunedLinear, RSparse, Teal, Wina
from dipper.methods.method import METHODS, Dense, Glu, Meter, Method, MethodConfig
from dipper.methods.planes import Planes
from dipper.methods.resident import Resident

__all__ = [
    "METHODS",
    "CachedMethod",
    "Dip",
    "Glu",
    "Meter",
    "Method",
    "MethodConfig",
    "Planes",
    "PrunedLinear",
    "Resident",
]

METHODS.update(
    (rule.name, rule)
    for rule in (
        Dense,
        GluOracle,
        GluDown,
        UpPruning,
        GatePruning,
        DejaVu,
        Magnitude,
        Wanda,
        SparseGpt,
        Teal,
        Wina,
        RSparse,
        Dip,
        DipCacheAware,
        DipLowRank,
        DipRescale,
        Planes,
        Resident,
    )
)
