"""Tokenizers of text encoders, from the files that came with their weights and lie beside them.

| encoder | files, the first set that is there | library |
|---|---|---|
| CLIP | `tokenizer.json`, or `vocab.json` and `merges.txt`: byte pairs | tokenizers |
| BERT | `tokenizer.json`, or `vocab.txt`: word pieces | tokenizers |
| T5 | `spiece.model`, or `tokenizer.json`: unigrams | sentencepiece, or tokenizers |

Start and end are added here, so padding and truncation that a file may demand change nothing.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dit_jax.error import UsageError, shown
from dit_jax.files import is_file, read
from dit_jax.files.text import parse_json
from dit_jax.networks.folder import read_meta

LONGEST = 2**26  # bytes of a file
FORMS = {
    "clip": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "bert": (("tokenizer.json",), ("vocab.txt",)),
    "t5": (("spiece.model",), ("tokenizer.json",)),
}
OPTIONS = "tokenizer_config.json"
ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "bert": ("[CLS]", "[SEP]"), "t5": ("", "</s>")}
PADDING = {"clip": "<|endoftext|>", "bert": "[PAD]", "t5": "<pad>"}  # unless the options say another
LEAST = 0.9  # of the table of embeddings: T5's 32,000 entries have 32,128 rows, a tokenizer without its vocabulary has a few


class Encoded(NamedTuple):
    """Captions as tokens: ids int32 (b, length); mask bool (b, length), False for padding; cut, how many captions were too long."""

    ids: np.ndarray
    mask: np.ndarray
    cut: int


@dataclass(frozen=True)
class Tokenizer:
    """Captions to tokens. `start` ("" has none), `end` and `padding` are ids, `size` is 1 + the largest id."""

    split: Callable[[list[str]], list[list[int]]]  # to ids without start and end
    start: tuple[int, ...]
    end: int
    padding: int
    size: int
    sha256: dict  # file -> SHA-256

    def encode(self, captions: list[str], length: int) -> Encoded:
        """Encode captions to `length` tokens each, start and end included; too long ones lose their last tokens before the end.

        Raises UsageError if `length` has no room for a token, or a caption is not Unicode text.
        """
        room = length - len(self.start) - 1
        if room < 1:
            raise UsageError(f"length: found {length}, expected at least {length - room + 1} tokens")
        for i, caption in enumerate(captions):
            _check_caption(i, caption)
        found = self.split(list(captions)) if captions else []
        ids = np.full((len(found), length), self.padding, np.int32)
        mask = np.zeros((len(found), length), bool)
        for row, tokens in enumerate(found):
            line = [*self.start, *tokens[:room], self.end]
            ids[row, : len(line)], mask[row, : len(line)] = line, True
        return Encoded(ids, mask, sum(len(tokens) > room for tokens in found))


def _check_caption(i: int, caption: str) -> None:
    try:
        caption.encode()
    except (UnicodeEncodeError, AttributeError):
        raise UsageError(f"caption {i}: found {shown(caption)[:200]}, expected text in Unicode") from None


def open_tokenizer(folder: str) -> Tokenizer:
    """Open the tokenizer of a converted encoder. Raises UsageError if it has none, or a file is not what was converted."""
    meta = read_meta(folder)
    stated, text = meta["source"].get("tokenizer"), meta["config"].get("text")
    forms = [{*form, OPTIONS} for form in FORMS.get(meta["kind"], ())]
    if not stated or not any(set(stated) <= form for form in forms) or not isinstance(text, dict):
        raise UsageError(
            f"{folder}: found a network of kind {meta['kind']!r} without a tokenizer, expected a text encoder"
        )
    files = {name: _read(folder, name) for name in stated}
    for name, content in files.items():
        if (found := hashlib.sha256(content).hexdigest()) != stated[name]:
            expected = f"expected {stated[name]} of meta.json; damaged: convert the encoder again"
            raise UsageError(f"{os.path.join(folder, name)}: found sha256 {found}, {expected}")
    return make_tokenizer(meta["kind"], files, text.get("vocabulary", 0), folder)


def find_files(kind: str, folder: str) -> dict[str, bytes]:
    """Read the tokenizer's files in an encoder's folder, or, in a pipeline of diffusers, in the folder beside it.

    Raises UsageError if its vocabulary is missing.
    """
    parent, name = os.path.split(os.path.abspath(folder) if "://" not in folder else folder.rstrip("/"))
    beside = os.path.join(parent, name.replace("text_encoder", "tokenizer"))
    for place in (folder, beside):
        for form in FORMS[kind]:
            if all(is_file(os.path.join(place, name)) for name in form):
                options = [OPTIONS] if is_file(os.path.join(place, OPTIONS)) else []
                return {name: _read(place, name) for name in (*form, *options)}
    forms = ", or ".join(" and ".join(form) for form in FORMS[kind])
    raise UsageError(f"--weights: {folder!r}: found no vocabulary of the tokenizer, expected {forms}")


def _read(folder: str, name: str) -> bytes:
    path = os.path.join(folder, name)
    if not is_file(path):
        raise UsageError(f"{path}: missing; convert the encoder again")
    content = read(path, LONGEST + 1)
    if len(content) > LONGEST:
        raise UsageError(f"{path}: found more than {LONGEST:,} bytes, expected a file of a tokenizer")
    return content


def make_tokenizer(kind: str, files: Mapping[str, bytes], rows: int, where: str) -> Tokenizer:
    """Make a tokenizer for an encoder with `rows` embeddings. Raises UsageError naming the file that is malformed or does not fit."""
    options = _options(files, where)
    try:
        make = _sentencepiece if "spiece.model" in files else functools.partial(_tokenizers, kind)
        split, count, size, find = make(files, options)
    except UsageError:
        raise
    except Exception as error:  # the libraries raise their own
        raise UsageError(f"{where}: {', '.join(files)}: not readable as a tokenizer: {error}") from None
    if not LEAST * rows <= count or size > rows:
        raise UsageError(
            f"{where}: found a tokenizer of {count:,} entries, the largest id {size - 1:,}, expected {round(LEAST * rows):,} to "
            f"{rows:,} entries for the encoder's {rows:,} embeddings; its vocabulary is missing, or another encoder's"
        )
    start, end = ENDS[kind]
    ids = {token: find(token) for token in (start, end, _token(options.get("pad_token")) or PADDING[kind]) if token}
    if missing := [token for token, found in ids.items() if found is None]:
        raise UsageError(f"{where}: found no token {missing[0]!r} in the tokenizer, expected one of {kind}'s")
    *_, padding = ids.values()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    return Tokenizer(split, (ids[start],) if start else (), ids[end], padding, size, digests)


def _options(files: Mapping[str, bytes], where: str) -> dict:
    try:
        found = parse_json(files.get(OPTIONS, b"{}"), LONGEST)
    except ValueError as error:
        raise UsageError(f"{where}: {OPTIONS}: not readable as JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def _token(found) -> str:
    """A token of the options, which is a text or an object with its content."""
    found = found.get("content") if isinstance(found, Mapping) else found
    return found if isinstance(found, str) else ""


def _missing(library: str) -> UsageError:
    return UsageError(f"{library}: not installed, and tokenizers need it; run `make text`, or pip install -e '.[text]'")


def _sentencepiece(files: Mapping[str, bytes], options: Mapping) -> tuple:
    try:
        import sentencepiece
    except ImportError:
        raise _missing("sentencepiece") from None
    model = sentencepiece.SentencePieceProcessor(model_proto=files["spiece.model"])
    count = model.get_piece_size()

    def find(token: str) -> int | None:
        found = model.piece_to_id(token)
        return found if found != model.unk_id() else None

    return model.encode, count, count, find


def _tokenizers(kind: str, files: Mapping[str, bytes], options: Mapping) -> tuple:
    try:
        import tokenizers
    except ImportError:
        raise _missing("tokenizers") from None
    if "tokenizer.json" in files:
        made = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        made.no_padding()
        made.no_truncation()
    else:
        made = {"clip": _byte_pairs, "bert": _word_pieces}[kind](tokenizers, files, options)
    known = made.get_vocab(with_added_tokens=True)

    def split(captions: list[str]) -> list[list[int]]:
        return [found.ids for found in made.encode_batch(captions, add_special_tokens=False)]

    return split, len(known), max(known.values(), default=-1) + 1, known.get


def _lines(content: bytes) -> list[str]:
    """Lines of a vocabulary, which may hold any character but a line feed."""
    return [line.removesuffix("\r") for line in content.decode().removesuffix("\n").split("\n")]


WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_pairs(tokenizers, files: Mapping[str, bytes], options: Mapping):
    """CLIP's: lower case, words and single digits, byte pairs in the order of the merges (Radford et al. 2021, section 2.4)."""
    pairs = [tuple(line.split()) for line in _lines(files["merges.txt"]) if line and not line.startswith("#version")]
    vocabulary = parse_json(files["vocab.json"], LONGEST)
    start, end = ENDS["clip"]
    model = tokenizers.models.BPE(vocabulary, pairs, unk_token=end, end_of_word_suffix="</w>")
    made, normal, cut = tokenizers.Tokenizer(model), tokenizers.normalizers, tokenizers.pre_tokenizers
    spaces = normal.Replace(tokenizers.Regex(r"\s+"), " ")
    made.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
    words = cut.Split(tokenizers.Regex(WORD), behavior="removed", invert=True)
    made.pre_tokenizer = cut.Sequence([words, cut.ByteLevel(add_prefix_space=False)])
    made.add_special_tokens([token for token in (start, end) if token in vocabulary])
    return made


def _word_pieces(tokenizers, files: Mapping[str, bytes], options: Mapping):
    """BERT's: words and punctuation, longest pieces first (Devlin et al. 2019; the options are those of transformers)."""
    vocabulary = {token: i for i, token in enumerate(_lines(files["vocab.txt"]))}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocabulary])
    return made
