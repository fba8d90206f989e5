"""The vocabulary of a GGUF file, rebuilt as a `tokenizers` file.

A GGUF carries pieces, scores or merges, and the *name* of a pre-tokenizer, not the tokenizer itself. What the names
mean (the splitting pattern, whether whole words skip the merges) is in `_PRE_TOKENIZERS`; a name that is not there is
an error, since a wrong split changes ids without a sign. Only what reads a model's source comes here: at run time a
bundle has `tokenizer.json` and this module is not imported.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from .errors import CheckpointError

__all__ = ["Vocabulary", "read_gguf_metadata", "read_gguf_vocabulary"]

# Token types of the GGUF format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6

# A GGUF names one end-of-text token, but chat models end a turn with another one.
_END_OF_TURN = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
)


class _PreTokenizer(NamedTuple):
    """How text is cut into words before the merges: each pattern cuts what the one before it left."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is itself a piece is taken without applying merges
    add_bos: bool = False  # when the file does not say
    compose: bool = False  # the original normalises to NFC


_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_WORD = r"[^\r\n\p{L}\p{N}]?"


def _llama_words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|{_NO_WORD}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, suffix: str = "") -> str:
    words = rf"{_NO_WORD}{_UPPER}*{_LOWER}+{suffix}|{_NO_WORD}{_UPPER}+{_LOWER}*{suffix}"
    return rf"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_GPT2 = _PreTokenizer((_GPT2_WORDS,))
_DIGITS_GPT2 = _PreTokenizer((r"\p{N}", _GPT2_WORDS))
_QWEN2 = _PreTokenizer((_llama_words(""),), compose=True)
_LLAMA3 = _PreTokenizer((_llama_words("{1,3}"),), whole_words=True, add_bos=True)
_UNNAMED = _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))

_PRE_TOKENIZERS = {
    "default": _UNNAMED,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _PreTokenizer((_llama_words(""),)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _PreTokenizer((_llama_words("{1,3}"),)),
    "smaug-bpe": _PreTokenizer((_llama_words("{1,3}"),)),
    "gpt-4o": _PreTokenizer((_cased_words("{1,3}", _CONTRACTIONS + "?"),)),
    "tekken": _PreTokenizer((_cased_words(""),), whole_words=True, add_bos=True),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what its source, a GGUF or a Hugging Face folder, says about using it."""

    tokenizer: tokenizers.Tokenizer
    bos_id: int | None
    eos_ids: list[int]
    add_bos: bool
    chat_template: str | None


def read_gguf_vocabulary(path: Path) -> Vocabulary:
    """Build the tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file is cut or malformed, or its tokenizer is of a kind that is not known here.
    """
    meta = read_gguf_metadata(path)
    pieces = _pieces(meta, path)
    model = meta.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: the tokenizer model is {model!r}, known are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece "
            "BPE): pack the original Hugging Face folder, if it has a tokenizer.json"
        )
    try:
        tokenizer = _byte_level(pieces, path) if model == "gpt2" else _sentence_piece(pieces, path)
        _add_special(tokenizer, pieces)
    except CheckpointError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a vocabulary that contradicts itself
        raise CheckpointError(
            f"{path}: the tokenizer cannot be built ({_first_line(error)}): fetch the file again"
        ) from error
    default_bos = True if model == "llama" else _pre_tokenizer(meta, path).add_bos
    add_bos = bool(meta.get("tokenizer.ggml.add_bos_token", default_bos)) and pieces.bos is not None
    template = meta.get("tokenizer.chat_template")
    return Vocabulary(tokenizer, pieces.bos, pieces.ends, add_bos, template if isinstance(template, str) else None)


@dataclass(frozen=True)
class _Pieces:
    meta: dict[str, Any]
    texts: list[str]
    types: list[int]
    bos: int | None
    ends: list[int]

    def ids(self) -> dict[str, int]:
        """Piece to id; of pieces written twice the first counts."""
        ids: dict[str, int] = {}
        for index, text in enumerate(self.texts):
            ids.setdefault(text, index)
        return ids


def _pieces(meta: dict[str, Any], path: Path) -> _Pieces:
    texts = meta.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
        raise CheckpointError(
            f"{path}: there is no tokenizer in this GGUF (tokenizer.ggml.tokens): pack the file that holds the first "
            "part of the model, or convert the model again with its vocabulary"
        )
    types = meta.get("tokenizer.ggml.token_type") or [_NORMAL] * len(texts)
    if len(types) != len(texts):
        raise CheckpointError(f"{path}: {len(texts)} tokens but {len(types)} token types: fetch the file again")
    sentence_piece = meta.get("tokenizer.ggml.model") == "llama"
    bos = _token_id(meta, "bos", len(texts), path, default=1 if sentence_piece else None)
    eos = _token_id(meta, "eos", len(texts), path, default=2 if sentence_piece else None)
    ends = [eos, _token_id(meta, "eot", len(texts), path), _token_id(meta, "eom", len(texts), path)]
    ends += [i for i, text in enumerate(texts) if types[i] == _CONTROL and text in _END_OF_TURN]
    return _Pieces(meta, texts, types, bos, list(dict.fromkeys(i for i in ends if i is not None)))


def _token_id(meta: dict[str, Any], name: str, size: int, path: Path, default: int | None = None) -> int | None:
    value = meta.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return default if default is not None and default < size else None
    if not isinstance(value, int) or not 0 <= value < size:
        raise CheckpointError(f"{path}: {name}_token_id is {value}, but there are {size} tokens: fetch the file again")
    return value


def _pre_tokenizer(meta: dict[str, Any], path: Path) -> _PreTokenizer:
    name = meta.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{path}: the pre-tokenizer {name!r} is not known (known: {', '.join(sorted(_PRE_TOKENIZERS))}), and a "
            "wrong one would change the tokens silently: pack the original Hugging Face folder with its tokenizer.json"
        )
    return _PRE_TOKENIZERS[name]


def _byte_level(pieces: _Pieces, path: Path) -> tokenizers.Tokenizer:
    pre = _pre_tokenizer(pieces.meta, path)
    merges = pieces.meta.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"{path}: a byte-level BPE tokenizer without tokenizer.ggml.merges: fetch the file again")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=pieces.ids(), merges=pairs, ignore_merges=pre.whole_words))
    if pre.compose:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(pieces: _Pieces, path: Path) -> tokenizers.Tokenizer:
    scores = pieces.meta.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(pieces.texts):
        raise CheckpointError(
            f"{path}: a SentencePiece tokenizer needs one score for each of {len(pieces.texts)} tokens: fetch it again"
        )
    ids = pieces.ids()
    unknown = next((text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == _UNKNOWN), None)
    if unknown is None:
        index = _token_id(pieces.meta, "unknown", len(pieces.texts), path)
        unknown = None if index is None else pieces.texts[index]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=_merges(pieces, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(pieces.meta.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(pieces: _Pieces, scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a list of scored pieces implies: every cut of a piece into two pieces, best score first."""
    ids = {text: i for i, text in enumerate(pieces.texts) if pieces.types[i] == _NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, text[:cut], text[cut:]))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _add_special(tokenizer: tokenizers.Tokenizer, pieces: _Pieces) -> None:
    named = {pieces.bos, *pieces.ends}
    # Phi-3 swallows the white space after its control tokens; the format has no field for it.
    strips = pieces.meta.get("general.architecture") == "phi3" and pieces.meta.get("tokenizer.ggml.model") == "llama"
    added = []
    for index, (text, kind) in enumerate(zip(pieces.texts, pieces.types, strict=True)):
        special = kind in (_CONTROL, _UNKNOWN) or index in named
        if text and (special or kind == _USER_DEFINED):
            rstrip = strips and special and text not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(text, normalized=False, special=special, rstrip=rstrip))
    tokenizer.add_tokens(added)


# struct codes of the GGUF value types; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Read the key-value section of a GGUF file.

    The `gguf` package makes several numpy views for each array element, 20 s for a vocabulary of 262,144; this takes
    0.2 s.

    Raises:
        CheckpointError: the file is not a GGUF, is cut, or holds a value of an unknown type.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _MetadataReader(view).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, struct.error, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({_first_line(error)}): fetch it again") from error


class _MetadataReader:
    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = 0

    def read(self) -> dict[str, Any]:
        magic = self._bytes(4)
        if magic != b"GGUF":
            raise ValueError(f"it starts with {magic!r}, not b'GGUF'")
        version, _tensors, count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, known are 2 and 3")
        meta = {}
        for _ in range(count):
            key = self._string()
            meta[key] = self._value(self._scalar("I"))
        return meta

    def _bytes(self, count: int) -> bytes:
        if count > len(self._view) - self._at:
            raise ValueError(f"a value of {count} bytes at offset {self._at} passes the end at {len(self._view)}")
        self._at += count
        return self._view[self._at - count : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item == _ARRAY:
            raise ValueError("an array of arrays")
        size = struct.calcsize(_SCALARS[item])
        return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._bytes(count * size)))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
