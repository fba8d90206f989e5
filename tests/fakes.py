"""An engine and a tokenizer without weights: what a test scripts is what they do.

`FakeTokenizer` knows a list of pieces; `FakeEngine` makes the scripted token the largest logit of every step. A `Clock`
advances when they work, so that times are exact.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dipper.device import Compute, Device, Dram, Flash
from dipper.engine import Counters, EngineConfig, Plan

PREFILL_S, STEP_S = 0.5, 0.1
BOS, EOS = 1, 2


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class FakeTokenizer:
    """Pieces by id: 0 unknown, 1 BOS, 2 end of text, then the 26 letters, a space and whatever `pieces` adds."""

    def __init__(self, pieces=(), *, bos_id=None, has_chat_template=True):
        self.pieces = [b"", b"", b"", *(bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz "), *pieces]
        self.bos_id = bos_id
        self.add_bos = bos_id is not None
        self.eos_ids = [EOS]
        self.has_chat_template = has_chat_template

    def ids(self, text):
        return [self.pieces.index(bytes([c])) for c in text.encode()]

    def encode(self, text, add_bos=None):
        head = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) else []
        return head + self.ids(text)

    def chat(self, messages):
        return "".join(f"{m['role'][0]} {m['content']} " for m in messages) + "a "

    def encode_chat(self, messages):
        # An end-of-text token closes every answer, as templates do.
        ids = []
        for message in messages:
            ids += self.ids(f"{message['role'][0]} {message['content']}")
            ids += [EOS] if message["role"] == "assistant" else self.ids(" ")
        return ids + self.ids("a ")

    def stream(self):
        import codecs

        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return SimpleNamespace(
            push=lambda token: utf8.decode(b"".join(self.pieces[token : token + 1])),
            finish=lambda: utf8.decode(b"", final=True),
        )


class FakeEngine:
    """Says `script` token by token, over and over across generations; nll of token t is `losses(tokens)`."""

    def __init__(
        self, script=(), *, config=None, context=64, vocab_size=32, clock=None, losses=None, path="fake.dipper"
    ):
        self.config = config or EngineConfig(method="dip", density=0.6)
        self.context, self.vocab_size = context, vocab_size
        self.script, self.clock, self.losses = list(script), clock or Clock(), losses
        self.bundle = SimpleNamespace(path=Path(path), mlp_bytes=9_000_000, model=SimpleNamespace(name="fake"))
        self.plan = Plan(
            parts={"host": 70_000_000, "resident": 30_000_000, "slots": 5_000_000, "kv": 0},
            budget_bytes=120_000_000,
            mlp_bytes=15_000_000,
            mlp_budget_bytes=None,
            mlp_bits_per_weight=2.5,
            cached_fraction=0.5,
            minimum_bytes=90_000_000,
            stream_reads=0,
            stream_bytes=0,
            token_stream_reads=0,
            token_stream_bytes=0,
            token_bytes=0,
            options={},
        )
        self.n_past, self.reader_backend, self.direct, self.isa, self.n_threads = 0, "io_uring", True, "avx2", 2
        self.notes = []
        self.densities, self.calibration_sha256 = self.config.densities, None
        self.held, self.calls, self.said = [], [], 0
        self.reset_counters()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.calls.append("close")

    def _logits(self):
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script[self.said % len(self.script)]] = 9.0
        self.said += 1
        return logits

    def _hold(self, tokens):
        assert self.n_past + len(tokens) <= self.context, "past the context"
        self.held += tokens
        self.n_past = len(self.held)

    def prefill(self, tokens):
        self.calls.append(("prefill", list(tokens)))
        self._hold(list(tokens))
        self.clock.now += PREFILL_S
        self.n_counted += 100  # prefill must not be counted: a generator that forgets to reset shows here
        return self._logits()

    def step(self, token, *, copy=True):
        self._hold([token])
        self.clock.now += STEP_S
        self.n_counted += 1
        return self._logits()

    def score(self, tokens):
        self.calls.append(("score", list(tokens)))
        self.n_counted += len(tokens) - 1
        return np.asarray(self.losses(list(tokens)), np.float64)

    def reset(self):
        self.calls.append("reset")
        self.held, self.n_past = [], 0

    def reset_cache(self):
        self.calls.append("reset_cache")

    def reset_counters(self):
        self.n_counted = 0

    def counters(self):
        n = self.n_counted
        return Counters(
            n_tokens=n, selected=10 * n, hits=7 * n, misses=3 * n, evictions=n, useful_bytes=3000 * n,
            flash_bytes=12288 * n, reads=3 * n, ledger_s={"select": 0.01 * n, "wait": 0.05 * n, "rest": 0.001 * n},
        )  # fmt: skip


def device(*, name="probe", gweights=1e6, **flash):
    """A device of a disk that 1 MB/s and nothing else holds back, unless told otherwise."""
    given = {"gbps": 1e-3, "cost_per_read_us": 0.0, "latency_us": 0.0, "queue_depth": 64, "alignment": 4096} | flash
    return Device(
        name=name,
        title="measured just now",
        dram=Dram(bytes=8 << 30, gbps=1e6),
        flash=Flash(**given),
        compute=Compute(gemv_gweights_per_s=gweights, gemm_gmacs_per_s=gweights),
    )
