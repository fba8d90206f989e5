"""How strongly each column's input is driven on a text: what orders the residuals of a split bundle on flash.

    energies = measure_energies("model.dipper", "train.txt", limit=8192)
    write_energies("model.npz", energies)          # dipper pack model.gguf --base-bits 3 --energies model.npz

The model runs dense in the native engine; nothing of PyTorch is needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dipper.budget import EngineConfig
from dipper.engine import Engine
from dipper.evaluate import read_text, text_windows
from dipper.files import whole_file
from dipper.tokenizer import Tokenizer

__all__ = ["measure_energies", "write_energies"]

Energies = dict[str, npt.NDArray[np.float64]]


def measure_energies(
    bundle: str | Path,
    text: str | os.PathLike[str],
    *,
    window: int = 1024,
    limit: int = 8192,
    config: EngineConfig | None = None,
) -> Energies:
    """Mean square input of every MLP column over a text.

    Args:
        bundle: the model, split or not.
        text: as for `dipper eval`; never the text that results are reported on.
        window: positions of a window.
        limit: positions in all.
        config: how to run it, for a model that memory cannot hold; its method must be dense. None: dense-resident.

    Returns:
        By region, "layers.N.input" and "layers.N.glu": [n_columns].

    Raises:
        ConfigError: the text or the window cannot be used.
        BudgetError: the budget is below the smallest that works.
    """
    source = read_text(text)
    tokenizer = Tokenizer.open(bundle)
    tokens = np.asarray(tokenizer.encode(source.text, add_bos=False), dtype=np.int32)
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    windows = text_windows(source, tokens, window, bos_id=bos_id, limit=limit)
    totals: Energies = {}
    n_tokens = 0
    with Engine.open(bundle, config or EngineConfig(method="dense-resident", context=window)) as engine:
        for ids in windows:
            engine.reset()
            for name, mean in engine.column_energies(ids).items():
                totals[name] = totals.get(name, 0.0) + mean * len(ids)
            n_tokens += len(ids)
    return {name: total / n_tokens for name, total in totals.items()}


def write_energies(path: str | os.PathLike[str], energies: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Keeps energies in an `.npz` file that is whole or absent.

    Raises:
        ConfigError: the folder does not exist.
    """
    with whole_file(path) as out:
        np.savez(out, allow_pickle=False, **energies)
