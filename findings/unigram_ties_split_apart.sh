#!/usr/bin/env bash
# sentencepiece 0.2.3 and tokenizers 0.23.3: the same Unigram pieces with the same scores cut a string in different places.
#
# Where two ways to cut a string have the same sum of scores, sentencepiece takes the shorter piece first, tokenizers the longer one
# first. Repeated digits are such strings: 999 is 9 99 for the one and 99 9 for the other. T5 was trained with sentencepiece; a fast
# tokenizer made from its model gives other ids for such numbers, of the same pieces in another order.
# Output seen:
#   sentencepiece 0.2.3, tokenizers 0.23.3
#   sentencepiece: 999 -> 9 99, abab -> ab ab, 99999 -> 9 99 99
#   tokenizers: 999 -> 99 9, abab -> ab ab, 99999 -> 99 99 9
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentencepiece==0.2.3 tokenizers==0.23.3 protobuf==7.36.2
cd "$folder"
venv/bin/python - <<'PY' | tee seen
from importlib.metadata import version

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto

PIECES = [("<unk>", 0.0), ("9", -2.0), ("99", -2.0), ("a", -4.0), ("b", -4.0), ("ab", -3.0)]
TEXTS = ("999", "abab", "99999")

model = proto.ModelProto()
for text, score in PIECES:
    kind = proto.ModelProto.SentencePiece.UNKNOWN if text == "<unk>" else proto.ModelProto.SentencePiece.NORMAL
    model.pieces.add(piece=text, score=score, type=kind)
model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
model.normalizer_spec.add_dummy_prefix = False
model.normalizer_spec.name = "identity"
one = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
other = tokenizers.Tokenizer(tokenizers.models.Unigram(PIECES, unk_id=0))
print(f"sentencepiece {version('sentencepiece')}, tokenizers {version('tokenizers')}")
print("sentencepiece: " + ", ".join(f"{text} -> {' '.join(one.encode(text, out_type=str))}" for text in TEXTS))
print("tokenizers: " + ", ".join(f"{text} -> {' '.join(other.encode(text).tokens)}" for text in TEXTS))
PY
diff seen <(sed -n 's/^#   //p' "$script") || { echo "this has changed" >&2; exit 1; }
