"""Text to token ids and back, and the chat template.

`write_tokenizer` runs once, when a model is packed; `Tokenizer` is what the engine holds. Opening one imports neither
torch, transformers nor gguf, and jinja2 only when a chat is rendered, since all of it would stand beside the budget.

Special tokens in text. `encode(special=True)` reads `<|im_end|>` in a text as that token, as other engines do: right for
a prompt the caller wrote in full. `encode_chat` reads special tokens of the *template* only; the same characters inside a
message are plain text, so that what a user types can neither end a turn nor open one.
"""

from __future__ import annotations

import codecs
import json
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from .errors import BundleError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["DecodeStream", "Tokenizer", "write_tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"

# A private-use character that breaks the text of a special token inside a message; it never reaches the model.
_BREAK = "\uf8f4"


def write_tokenizer(source: Path, out_dir: Path) -> dict[str, Any]:
    """Write `tokenizer.json`, and `chat_template.jinja` if the source has one, into an existing folder.

    Args:
        source: a GGUF file or a Hugging Face folder.
        out_dir: where the files go.

    Returns:
        `{"bos_id": int | None, "eos_ids": [int, ...], "add_bos": bool}`, the header's fields of these names.

    Raises:
        CheckpointError: the source has no tokenizer, a malformed one, or one of a kind that is not known.
    """
    source, out_dir = Path(source), Path(out_dir)
    if source.is_dir():
        return _write_from_folder(source, out_dir)
    from .vocabulary import read_gguf_vocabulary

    vocabulary = read_gguf_vocabulary(source)
    vocabulary.tokenizer.save(str(out_dir / TOKENIZER_FILE), pretty=False)
    if vocabulary.chat_template is not None:
        (out_dir / TEMPLATE_FILE).write_text(vocabulary.chat_template, encoding="utf-8", newline="")
    return {"bos_id": vocabulary.bos_id, "eos_ids": vocabulary.eos_ids, "add_bos": vocabulary.add_bos}


def _write_from_folder(source: Path, out_dir: Path) -> dict[str, Any]:
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(_how_to_make_tokenizer_json(source))
    tokenizer = _load(path, CheckpointError)
    _text_kind(tokenizer, path, CheckpointError)
    settings = _read_json(source / "tokenizer_config.json")
    config, generation = _read_json(source / "config.json"), _read_json(source / "generation_config.json")
    config = {**(config.get("text_config") or {}), **config}
    shutil.copyfile(path, out_dir / TOKENIZER_FILE)
    template = _folder_template(source, settings)
    if template is not None:
        (out_dir / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="")
    bos = _named_id(tokenizer, settings.get("bos_token"))
    if bos is None:
        bos = next(iter(_ids(config.get("bos_token_id")) + _ids(generation.get("bos_token_id"))), None)
    named_eos = _named_id(tokenizer, settings.get("eos_token"))
    eos = _ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id")) + _ids(named_eos)
    return {"bos_id": bos, "eos_ids": list(dict.fromkeys(eos)), "add_bos": _adds_bos(tokenizer, settings, bos)}


def _how_to_make_tokenizer_json(source: Path) -> str:
    if (source / "tokenizer.model").is_file():
        return (
            f"{source} has a SentencePiece tokenizer.model but no {TOKENIZER_FILE}: make one with "
            f"`python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{source}').save_pretrained("
            f"'{source}')\"` (needs transformers and sentencepiece), then pack again"
        )
    return f"{source} has no {TOKENIZER_FILE}: download the tokenizer files of the model into it, then pack again"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({_one_line(error)}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object: fetch it again")
    return value


def _folder_template(source: Path, settings: dict[str, Any]) -> str | None:
    """The chat template; a file of its own wins, as it does in transformers."""
    path = source / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _read_json(source / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _named_id(tokenizer: tokenizers.Tokenizer, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _adds_bos(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], bos: int | None) -> bool:
    """Whether the original puts BOS first: the configuration when it says so, else what the post-processor does."""
    if bos is None:
        return False
    said = settings.get("add_bos_token")
    if isinstance(said, bool):
        return said
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == bos


def _load(path: Path, error_type: type[Exception]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise error_type(f"{path} is not a tokenizer file ({_one_line(error)}): fetch or pack it again") from error
    # Some published files cut or pad every text; a prompt must be neither.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _text_kind(tokenizer: tokenizers.Tokenizer, path: Path, error_type: type[Exception]) -> str:
    """How pieces become bytes: "bytes" (byte-level BPE) or "spaces" (SentencePiece, where ▁ is a space)."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    steps = {step.get("type") for step in decoder.get("decoders", [decoder])}
    if steps == {"ByteLevel"}:
        return "bytes"
    if steps and steps <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return "spaces"
    raise error_type(
        f"{path}: the decoder {sorted(map(str, steps))} is not known; dipper reads byte-level BPE and SentencePiece "
        "tokenizers: use a model with one of these"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
