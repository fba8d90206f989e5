"""The Python of docs/quickstart.md runs, in its order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny

PAGE = Path(__file__).parents[1] / "docs" / "quickstart.md"


@pytest.mark.torch
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from dipper.methods import METHODS

    model = tiny.write_gguf(
        tmp_path / "tiny.gguf", vocabulary=tiny.bpe_keys(), vocab_size=264, max_position_embeddings=1024
    )
    (tmp_path / "wiki.test.raw").write_text("a text of some words, " * 110, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert code.count('"smollm2"') == 3
    try:
        exec(compile(code.replace('"smollm2"', repr(str(model))), str(PAGE), "exec"), {})
    finally:
        METHODS.pop("inputs", None)
    said = capsys.readouterr().out
    assert re.search(r"a token touched 60 % of|a token touched 60%", said)
    assert [line.split(":")[0] for line in said.splitlines()[1:4]] == ["dip", "gate", "glu-oracle"]
    assert re.search(r"perplexity [\d.]+, touched 60%", said)
