"""One llama.cpp model kept loaded: reads JSON commands on stdin, answers one JSON line each on stdout.

Runs under the Python that has `llama-cpp-python` (see bench_llamacpp.py), so it imports nothing of dipper. The
low-level API is used, with an argmax by numpy as sampling: the least that Python can put on top of llama.cpp.

    llama_worker.py quantise SOURCE.gguf TARGET.gguf HEAD_TYPE     (HEAD_TYPE: ggml's number of the head's type, kept)
    llama_worker.py serve MODEL.gguf N_CTX N_THREADS [no-repack] [no-mmap]
        {"op": "tokenise", "text": ..., "bos": true} -> {"tokens": [...]}
        {"op": "decode", "prompt": [...], "n": 64}   -> {"prefill_s": ..., "decode_s": ..., "tokens": [...]}
        {"op": "more", "token": ..., "n": 64}        -> {"decode_s": ..., "tokens": [...]}, going on with `token`
        {"op": "score", "tokens": [...]}             -> {"nll": [...]}
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

import llama_cpp as llama
import numpy as np

SETTINGS = {"no-repack", "no-mmap"}


@llama.llama_log_callback
def _silent(level, text, user_data):
    if level == 4:  # GGML_LOG_LEVEL_ERROR; 5 continues a line of any level
        sys.stderr.write(text.decode(errors="replace"))


def quantise(source: str, target: str, head_type: int) -> None:
    params = llama.llama_model_quantize_default_params()
    params.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.pure = False
    params.nthread = 2
    params.output_tensor_type = params.token_embedding_type = head_type
    partial = target + ".partial"
    if llama.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(params)) != 0:
        sys.exit(f"llama.cpp could not requantise {source}")
    Path(partial).rename(target)


class Model:
    """A loaded model and its context."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, *settings: str) -> None:
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        if "no-repack" in settings:  # else weights that the kernels want in another order are copied
            model_params.use_extra_bufts = False
        if "no-mmap" in settings:
            if hasattr(model_params, "load_mode"):
                model_params.load_mode = llama.LLAMA_LOAD_MODE_NONE
            else:  # older versions
                model_params.use_mmap = False
        self.model = llama.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            sys.exit(f"llama.cpp could not load {path}")
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_ctx
        params.n_threads = params.n_threads_batch = n_threads
        self.n_ctx = n_ctx
        self.ctx = llama.llama_init_from_model(self.model, params)
        if not self.ctx:
            sys.exit(f"llama.cpp could not make a context of {n_ctx} tokens for {path}")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocab)

    def reset(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.ctx), True)

    def eval(self, tokens: list[int]) -> None:
        ids = (llama.llama_token * len(tokens))(*tokens)
        if llama.llama_decode(self.ctx, llama.llama_batch_get_one(ids, len(tokens))) != 0:
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")

    def logits(self, i: int = -1) -> np.ndarray:  # [n_vocab]
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.ctx, i), shape=(self.n_vocab,))

    def tokenise(self, text: str, bos: bool) -> dict:
        raw = text.encode()
        room = len(raw) + 8
        ids = (llama.llama_token * room)()
        n = llama.llama_tokenize(self.vocab, raw, len(raw), ids, room, bos, False)
        return {"tokens": list(ids[:n])}

    def decode(self, prompt: list[int], n: int) -> dict:
        self.reset()
        start = time.perf_counter()
        self.eval(prompt)
        token = int(self.logits().argmax())
        prefill_s = time.perf_counter() - start
        return {"prefill_s": prefill_s, **self.more(token, n)}

    def more(self, token: int, n: int) -> dict:
        start = time.perf_counter()
        tokens = [token]
        for _ in range(n):
            self.eval(tokens[-1:])
            tokens.append(int(self.logits().argmax()))
        return {"decode_s": time.perf_counter() - start, "tokens": tokens}

    def score(self, tokens: list[int]) -> dict:
        """Negative log-likelihood of tokens[1:], from one batch that asks for the logits of every position."""
        self.reset()
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        failed = llama.llama_decode(self.ctx, batch)
        llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        nll = []
        for i in range(len(tokens) - 1):
            row = self.logits(i).astype(np.float64)
            peak = row.max()
            nll.append(float(peak + np.log(np.exp(row - peak).sum()) - row[tokens[i + 1]]))
        return {"nll": nll}


def serve(path: str, n_ctx: int, n_threads: int, *settings: str) -> None:
    model = Model(path, n_ctx, n_threads, *settings)
    print(json.dumps({"ready": path, "version": llama.__version__}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(model, command.pop("op"))(**command)
        print(json.dumps(answer), flush=True)


def main() -> None:
    llama.llama_log_set(_silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    match sys.argv[1:]:
        case ["quantise", source, target, head_type]:
            quantise(source, target, int(head_type))
        case ["serve", path, n_ctx, n_threads, *settings] if {*settings} <= SETTINGS:
            serve(path, int(n_ctx), int(n_threads), *settings)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
