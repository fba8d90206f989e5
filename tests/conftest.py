"""Real models for tests that want one: from dipper's cache, else a skip with the reason.

DIPPER_REQUIRE_MODELS=1 fetches the missing ones and turns the skip into a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dipper.errors import SourceError
from dipper.sources import pull

# How fast a machine draws examples says nothing about dipper.
settings.register_profile("dipper", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dipper")

REQUIRED = os.environ.get("DIPPER_REQUIRE_MODELS") == "1"


def _model(name: str, *, may_fetch: bool = False) -> Path:
    try:
        return pull(name, local_only=not (REQUIRED or may_fetch))
    except SourceError as error:
        if REQUIRED:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct Q4_1, 98 MB: fetched when it is not in the cache."""
    return _model("smollm2", may_fetch=True)


@pytest.fixture(scope="session")
def qwen_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M, 491 MB."""
    return _model("qwen2.5-0.5b")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M Q4_K_M, 253 MB."""
    return _model("gemma3-270m")
