"""Tokenizers out of weight files: the ids of sentencepiece and of transformers, and a sentence for every damage."""

import io
import re

import gguf
import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import T5Tokenizer

from frameloom.errors import CheckpointError
from frameloom.models.tokenizer import tokenizer_of
from frameloom.weights.files import read_file
from frameloom.weights.header import TensorEntry
from frameloom.weights.vocabulary import MAX_BYTES, read_vocabulary

SENTENCES = [
    "a red circle moves from left to right",
    "Ein großer Kreis wandert über die Straße",
    "кот сидит на крыше",
    "naïve café résumé",
    "一只红色的圆在慢慢移动",
    "カメラがゆっくり動く",
    "the quick brown fox jumps over the lazy dog 0123456789",
]
AWKWARD = [
    "",
    " ",
    "a red circle",
    "  two   spaces \t and\na line ",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３",
    "① ½ ﬁ ™ Å",
    "cafe\u0301 and café",
    "emoji 🎬🧑‍🚀 and flags 🇫🇷",
    "ÄÖÜ ß straße",
    "кот\u00a0и\u200bпёс",
    "▁ a mark ▁▁ of its own",
    "漢字ひらがな",
    "</ s> <unk_> <",
    "x" * 300,
]


def trained(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type=options.pop("model_type", "unigram"),
        vocab_size=options.pop("vocab_size", 150),
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model():
    return trained(user_defined_symbols=["<extra_id_0>"], control_symbols=["<ctrl>"])


@pytest.fixture
def file(model, tmp_path):
    (tmp_path / "spiece.model").write_bytes(model)
    return tmp_path / "spiece.model"


def ids(tokenizer, text):
    return tokenizer.backend.encode(text).ids


def test_a_sentencepiece_file_makes_the_very_tokenizer_that_transformers_makes(file):
    reference = T5Tokenizer.from_pretrained(str(file.parent), extra_ids=0)
    ours = tokenizer_of(read_vocabulary(file))
    assert ours.backend.to_str() == reference.backend_tokenizer.to_str()
    for text in [*AWKWARD, *SENTENCES, "the end </s> and <extra_id_0> or <ctrl><pad>"]:
        assert ids(ours, text) == reference(text).input_ids, text


def test_its_ids_are_those_of_sentencepiece_itself(file, model):
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizer_of(read_vocabulary(file))
    for text in [*AWKWARD, *SENTENCES]:
        assert ids(ours, text) == [*reference.encode(text), reference.eos_id()], text


def test_normalisation_may_be_left_out(tmp_path):
    path = tmp_path / "plain.model"
    path.write_bytes(trained(normalization_rule_name="identity"))
    vocabulary = read_vocabulary(path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    assert vocabulary.charsmap == b""
    assert ids(tokenizer_of(vocabulary), "großer Kreis") == [*reference.encode("großer Kreis"), 1]


def test_the_tensor_of_a_text_encoder_file_holds_the_same(file, model, tmp_path):
    path = tmp_path / "umt5.safetensors"
    path.write_bytes(b"before" + model + b"behind")
    entry = TensorEntry(
        name="spiece_model", dtype="U8", shape=(len(model),), file=path, offset=6, size_bytes=len(model)
    )
    assert read_vocabulary(entry) == read_vocabulary(file)


@pytest.fixture
def metadata(file):
    """The keys of llama.cpp's files."""
    found = read_vocabulary(file)
    return {
        "general.architecture": "t5encoder",
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": found.pieces,
        "tokenizer.ggml.scores": found.scores,
        "tokenizer.ggml.token_type": found.types,
        "tokenizer.ggml.precompiled_charsmap": tuple(found.charsmap),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_the_lists_of_a_gguf_file_hold_the_same(file, metadata):
    assert read_vocabulary(metadata) == read_vocabulary(file)


def test_a_gguf_file_as_the_gguf_package_writes_it_brings_its_tokenizer(file, tmp_path):
    path, expected = tmp_path / "umt5.gguf", read_vocabulary(file)
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list(list(expected.pieces))
    writer.add_token_scores(list(expected.scores))
    writer.add_token_types(list(expected.types))
    writer.add_precompiled_charsmap(expected.charsmap)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((150, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_vocabulary(read_file(path).metadata) == expected


def test_pieces_for_bytes_stay_unused_as_in_the_reference(tmp_path):
    (tmp_path / "spiece.model").write_bytes(
        trained(byte_fallback=True, vocab_size=400, normalization_rule_name="identity")
    )
    ours = tokenizer_of(read_vocabulary(tmp_path / "spiece.model"))
    reference = T5Tokenizer.from_pretrained(str(tmp_path), extra_ids=0)
    assert ids(ours, "ж🎬").count(2) == 1
    assert ids(ours, "ж🎬") == reference("ж🎬").input_ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "llama"}, "of the kind 'llama'"),
        ({"tokens": ()}, "has 0 pieces"),
        ({"tokens": ("a",)}, "has 1 pieces"),
        ({"tokens": "text"}, "tokens are no list"),
        ({"tokens": (1, 2)}, "tokens are of the wrong kind"),
        ({"scores": (0.0,)}, "1 scores"),
        ({"eos_token_id": 10**9}, "end_id is 1000000000"),
        ({"padding_token_id": "0"}, "padding_token_id is '0'"),
        ({"precompiled_charsmap": (1, 2, 3)}, "table of characters is damaged"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_used_is_refused(metadata, change, said):
    broken = metadata | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_vocabulary(broken)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("scores", float("nan"), "no finite number"),
        ("scores", float("inf"), "no finite number"),
        ("tokens", "", "empty or there twice"),
        ("tokens", "<pad>", "empty or there twice"),
        ("token_type", 99, "unknown type"),
    ],
)
def test_one_wrong_piece_is_enough(metadata, name, value, said):
    values = list(metadata[f"tokenizer.ggml.{name}"])
    values[7] = value
    with pytest.raises(CheckpointError, match=said):
        read_vocabulary(metadata | {f"tokenizer.ggml.{name}": tuple(values)})


def test_only_unigram_models_are_t5s(tmp_path):
    (tmp_path / "bpe.model").write_bytes(trained(model_type="bpe"))
    with pytest.raises(CheckpointError, match="no unigram model"):
        read_vocabulary(tmp_path / "bpe.model")


def test_a_tensor_too_large_or_of_other_numbers_is_not_read(tmp_path):
    large = TensorEntry(
        name="spiece_model", dtype="U8", shape=(MAX_BYTES + 1,), file=tmp_path, offset=0, size_bytes=MAX_BYTES + 1
    )
    with pytest.raises(CheckpointError, match="more than"):
        read_vocabulary(large)
    floats = TensorEntry(name="spiece_model", dtype="F32", shape=(1,), file=tmp_path, offset=0, size_bytes=4)
    with pytest.raises(CheckpointError, match="not bytes"):
        read_vocabulary(floats)


def try_out(path):
    """Reads and uses a vocabulary, or says in one sentence why not."""
    try:
        tokenizer = tokenizer_of(read_vocabulary(path))
    except CheckpointError:
        return
    for text in AWKWARD:
        assert ids(tokenizer, text)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_never_crashes_the_library(model, tmp_path, data):
    """Flipped bytes, in the pieces or in the table of characters, whose trie the library follows without looking."""
    broken = bytearray(model)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "broken.model"
    path.write_bytes(broken[: data.draw(st.sampled_from([len(broken), len(broken) // 2, len(broken) - 1]))])
    try_out(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200))
def test_bytes_of_any_kind_are_answered_in_one_sentence(tmp_path, noise):
    path = tmp_path / "noise.model"
    path.write_bytes(noise)
    try_out(path)
