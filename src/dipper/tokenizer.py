"""Text to token ids and back, and the chat template.

`write_tokenizer` runs once, when a model is packed; `Tokenizer` is what the engine holds: `open` takes a bundle's,
`of_checkpoint` a GGUF's or Hugging Face folder's, the same one without packing. Opening one imports neither torch,
transformers nor gguf, and jinja2 only when a chat is rendered, since all of it would stand beside the budget.

Special tokens in text. `encode(special=True)` reads `<|im_end|>` in a text as that token, as other engines do: right
for a prompt the caller wrote in full. `encode_chat` reads special tokens of the *template* only; the same characters
inside a message are plain text, so that what a user types can neither end a turn nor open one.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers

from .chat_template import ChatTemplate
from .errors import BundleError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from .vocabulary import Vocabulary

__all__ = ["DecodeStream", "Tokenizer", "write_tokenizer"]

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"

# Bytes that byte-level BPE writes as themselves; the others become the characters from U+0100 on, in order.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE}
_BYTE_OF.update({chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))})
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


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
    vocabulary = _read_vocabulary(source)
    if source.is_dir():
        shutil.copyfile(source / TOKENIZER_FILE, out_dir / TOKENIZER_FILE)
    else:
        vocabulary.tokenizer.save(str(out_dir / TOKENIZER_FILE), pretty=False)
    if vocabulary.chat_template is not None:
        (out_dir / TEMPLATE_FILE).write_text(vocabulary.chat_template, encoding="utf-8", newline="")
    return {"bos_id": vocabulary.bos_id, "eos_ids": vocabulary.eos_ids, "add_bos": vocabulary.add_bos}


def _read_vocabulary(source: Path) -> Vocabulary:
    """The tokenizer of a GGUF file or a Hugging Face folder, and how it is used."""
    from .vocabulary import Vocabulary, read_gguf_vocabulary

    if not source.is_dir():
        return read_gguf_vocabulary(source)
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(_how_to_make_tokenizer_json(source))
    tokenizer = _load(path, CheckpointError)
    _decoder_of(tokenizer, path, CheckpointError)
    settings = _read_json(source / "tokenizer_config.json")
    config, generation = _read_json(source / "config.json"), _read_json(source / "generation_config.json")
    config = {**(config.get("text_config") or {}), **config}
    bos = _named_id(tokenizer, settings.get("bos_token"))
    if bos is None:
        bos = next(iter(_ids(config.get("bos_token_id")) + _ids(generation.get("bos_token_id"))), None)
    named_eos = _named_id(tokenizer, settings.get("eos_token"))
    eos = _ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id")) + _ids(named_eos)
    return Vocabulary(
        tokenizer=tokenizer,
        bos_id=bos,
        eos_ids=list(dict.fromkeys(eos)),
        add_bos=_adds_bos(tokenizer, settings, bos),
        chat_template=_folder_template(source, settings),
    )


def _how_to_make_tokenizer_json(source: Path) -> str:
    if (source / "tokenizer.model").is_file():
        return (
            f"{source} has a SentencePiece tokenizer.model but no {TOKENIZER_FILE}: make one with "
            f"`python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{source}').save_pretrained("
            f"'{source}')\"` (needs transformers and sentencepiece), then try again"
        )
    return f"{source} has no {TOKENIZER_FILE}: download the tokenizer files of the model into it, then try again"


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
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]  # -1: none


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


class Tokenizer:
    """The tokenizer of one model; `open` makes it. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        decoder: _Decoder,
        *,
        template: str | None = None,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool = False,
    ) -> None:
        self.bos_id = bos_id
        self.eos_ids = list(eos_ids)
        self.add_bos = add_bos and bos_id is not None
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._lock = threading.Lock()  # `encode_special_tokens` is a state of the tokenizer, not an argument
        self._added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in self._added.items() if token.special}
        self._special_pattern = _special_pattern(token for token in self._added.values() if token.special)
        self._template = None if template is None else ChatTemplate(template, self._text(bos_id), self._text_of_eos())

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] | None = None,
        add_bos: bool | None = None,
    ) -> Tokenizer:
        """Open a bundle's tokenizer, or a `tokenizer.json` that stands alone.

        Args:
            path: a bundle, any folder with a `tokenizer.json`, or that file.
            bos_id: overrides the bundle's header, as do `eos_ids` and `add_bos`; without a header the default is none.
            eos_ids: the tokens that end a generation.
            add_bos: whether `encode` puts BOS first by default.

        Raises:
            BundleError: there is no tokenizer, it or the header is malformed, or a file does not match its checksum.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise BundleError(f"{file} does not exist: give a bundle, or pack the model again")
        header, files = _header(file.parent / "bundle.json")
        if files is not None:
            _check_sha256(file, files)
            _check_sha256(file.parent / TEMPLATE_FILE, files)
        tokenizer = _load(file, BundleError)
        return cls(
            tokenizer,
            _decoder_of(tokenizer, file, BundleError),
            template=_template_beside(file),
            bos_id=header.get("bos_id") if bos_id is None else bos_id,
            eos_ids=header.get("eos_ids") or () if eos_ids is None else eos_ids,
            add_bos=bool(header.get("add_bos")) if add_bos is None else add_bos,
        )

    @classmethod
    def of_checkpoint(cls, source: Path | str) -> Tokenizer:
        """The tokenizer of a GGUF file or a Hugging Face folder: the one that a bundle packed from it has.

        Raises:
            CheckpointError: the source has no tokenizer, a malformed one, or one of a kind that is not known.
        """
        source = Path(source)
        vocabulary = _read_vocabulary(source)
        return cls(
            vocabulary.tokenizer,
            _decoder_of(vocabulary.tokenizer, source, CheckpointError),
            template=vocabulary.chat_template,
            bos_id=vocabulary.bos_id,
            eos_ids=vocabulary.eos_ids,
            add_bos=vocabulary.add_bos,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens with a text; a model's logits may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` and `encode_chat` work."""
        return self._template is not None

    def encode(self, text: str, add_bos: bool | None = None, *, special: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: what the model is to read.
            add_bos: put BOS first; None is the model's own habit. A text that starts with BOS gets no second one.
            special: read `<|im_end|>` and the like as the special tokens they name; else as plain text.

        Raises:
            ConfigError: the text has a lone surrogate, so it is not Unicode.
        """
        return self._with_bos(self._encode(text, special), add_bos)

    def _with_bos(self, ids: list[int], add_bos: bool | None) -> list[int]:
        wanted = self.add_bos if add_bos is None else add_bos
        return [self.bos_id, *ids] if wanted and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which no "
                "tokenizer can read: give valid Unicode (is the file UTF-8?)"
            ) from error
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn a whole sequence of token ids into text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ConfigError: an id is negative.
        """
        stream = self.stream(skip_special=skip_special)
        text = "".join(map(stream.push, ids)) + stream.finish()
        return text[1:] if self._decoder.strips_first_space and text.startswith(" ") else text

    def stream(self, *, skip_special: bool = True) -> DecodeStream:
        """A decoder for ids that come one by one, as a continuation of a text."""
        return DecodeStream(self, skip_special=skip_special)

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes that a token stands for; none for an id beyond the vocabulary.

        Raises:
            ConfigError: the id is negative.
        """
        if token_id < 0:
            raise ConfigError(f"token id {token_id} is negative: ids are 0 to {self.vocab_size - 1}")
        added = self._added.get(token_id)
        if added is not None and added.special and skip_special:
            return b""
        piece = added.content if added is not None else self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._decoder.byte_level:
            return piece.encode() if added is not None else _bytes_of_characters(piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages with the model's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: more names for the template, such as `tools`.

        Raises:
            ConfigError: there is no template, it is invalid, or it refuses these messages.
        """
        if self._template is None:
            raise ConfigError("this model has no chat template: give a prompt, or use an instruct model")
        return self._template.render(messages, add_generation_prompt, variables or {})

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render messages and turn them into ids; special tokens come from the template only, never from a message.

        Raises:
            ConfigError: as `chat` and `encode`.
        """
        prompt = self.chat(messages, add_generation_prompt, variables)
        mark = _unused_character(prompt)
        # Every character of the match is set apart: a shorter special token may hide inside it or overlap its end.
        marked = _map_text(messages, lambda text: self._special_pattern.sub(lambda m: mark.join(m[0]) + mark, text))
        if marked == list(messages):
            return self.encode(prompt)
        ids = self._encode_marked(self.chat(marked, add_generation_prompt, variables), mark)
        return self._with_bos(ids, None)

    def _encode_marked(self, prompt: str, mark: str) -> list[int]:
        """Encode a prompt in which `mark` has broken every special token that is to be plain text."""
        ids: list[int] = []
        at = 0
        for match in self._special_pattern.finditer(prompt):
            ids += self._encode(prompt[at : match.start()].replace(mark, ""), special=False)
            ids.append(self._special[match[0] if match[0] in self._special else match[0].strip()])
            at = match.end()
        return ids + self._encode(prompt[at:].replace(mark, ""), special=False)

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else self._tokenizer.id_to_token(token_id) or ""

    def _text_of_eos(self) -> str:
        return self._text(self.eos_ids[0]) if self.eos_ids else ""


class DecodeStream:
    """Text from ids that come one by one: `push` returns what is certain, never half of a UTF-8 character.

    The pieces joined are `decode` of all ids, but for the space at the start of a text that SentencePiece models add
    and `decode` takes away: a stream continues a text, where that space counts.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add one token and return the text that it completes, which may be none.

        Raises:
            ConfigError: the id is negative.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def finish(self) -> str:
        """End the sequence: U+FFFD if it stops inside a character. The stream can be used again afterwards."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _bytes_of_characters(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # a padding token, written as text
        return piece.encode()


def _special_pattern(tokens: Iterable[tokenizers.AddedToken]) -> re.Pattern[str]:
    """Any special token, the longest first, with the white space that it swallows."""
    alternatives = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: -len(token.content))
        if token.content
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_text(key, change): _map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    return value


def _unused_character(text: str) -> str:
    """A private-use character that the text does not have."""
    for code in range(0xE000, 0xF900):
        if chr(code) not in text:
            return chr(code)
    raise ConfigError("the messages use all 6400 private-use characters of Unicode: remove some")


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`model` and `files` of a header; nothing and None where there is no bundle."""
    if not path.is_file():
        return {}, None
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        return dict(header["model"]), dict(header["files"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is not a bundle header ({_one_line(error)}): pack the model again") from error


def _check_sha256(path: Path, files: dict[str, Any]) -> None:
    """A bundle's file against the header; one that the header does not list does not match either."""
    if not path.is_file() and path.name not in files:
        return
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({_one_line(error)}): pack the model again") from error
    entry = files.get(path.name)
    if not isinstance(entry, dict) or entry.get("sha256") != digest.hexdigest():
        raise BundleError(f"{path} does not match its checksum: the bundle is damaged, pack it again")


def _template_beside(file: Path) -> str | None:
    path = file.parent / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({_one_line(error)}): pack the model again") from error


def _load(path: Path, error_type: type[Exception]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise error_type(f"{path} is not a tokenizer file ({_one_line(error)}): fetch or pack it again") from error
    # Some published files cut or pad every text; a prompt must be neither.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _return_freed_memory()
    return tokenizer


def _return_freed_memory() -> None:
    """Give what parsing freed back to the system: 193 of 305 MiB for 262,144 pieces, which would sit in the budget."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


class _Decoder(NamedTuple):
    """How pieces become bytes: each character is one (byte-level BPE), or ▁ is a space (SentencePiece)."""

    byte_level: bool
    strips_first_space: bool


def _decoder_of(tokenizer: tokenizers.Tokenizer, path: Path, error_type: type[Exception]) -> _Decoder:
    spec = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    steps = {step.get("type"): step for step in spec.get("decoders", [spec])}
    if set(steps) == {"ByteLevel"}:
        return _Decoder(byte_level=True, strips_first_space=False)
    if "Metaspace" in steps or ("Replace" in steps and set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip"}):
        strips = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        return _Decoder(byte_level=False, strips_first_space=strips)
    raise error_type(
        f"{path}: the decoder {sorted(map(str, steps))} is not known; dipper reads byte-level BPE and SentencePiece "
        "tokenizers: use a model with one of these"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
