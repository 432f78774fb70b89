import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from minilib.model import tokenizer
from minilib.model.tokenizer import END

TEXTS = ["def forward(self, x):\n    return self.weight * x\n", "for x in range(10):\n    print(x)\n"] * 20
TRAINED = tokenizer.train(TEXTS, 320)
BYTES = tokenizer.train([], 257)  # nothing learnt: one token per byte
texts = st.text()


@given(texts)
@example("")
@example("  two  spaces\t\r\n\n ")
@example("naïve 文字 🙂 e\u0301 \x00 \ufeff \u202e")
def test_any_text_survives(text):
    for trained in (TRAINED, BYTES):
        assert trained.decode(trained.encode(text).ids) == text


@given(st.binary())
def test_any_bytes_that_are_text_survive(data):
    text = data.decode("utf-8", errors="ignore")
    assert TRAINED.decode(TRAINED.encode(text).ids) == text
    latin = data.decode("latin-1")
    assert TRAINED.decode(TRAINED.encode(latin).ids) == latin


@given(texts)
def test_an_untrained_tokenizer_writes_one_token_per_byte(text):
    assert len(BYTES.encode(text).ids) == len(text.encode())


def test_a_text_that_quotes_the_end_mark_survives_and_does_not_end(tmp_path):
    quoted = f"END = {END!r}"
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    for trained in (TRAINED, tokenizer.load(tmp_path)):
        row = tokenizer.encode_all(trained, [quoted])
        assert row.count(trained.token_to_id(END)) == 1
        assert trained.decode(row[:-1]) == quoted


def test_every_text_is_followed_by_the_end_token():
    end = TRAINED.token_to_id(END)
    row = tokenizer.encode_all(TRAINED, (text for text in ["x = 1", "", "y = 2"]))
    assert row == [*TRAINED.encode("x = 1").ids, end, end, *TRAINED.encode("y = 2").ids, end]
    assert tokenizer.encode_all(TRAINED, []) == []
    assert TRAINED.decode(row) == "x = 1y = 2"


def test_a_tokenizer_without_the_end_token_is_refused():
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"x": 0}, merges=[]))
    with pytest.raises(ValueError, match=END.replace("|", r"\|")):
        tokenizer.encode_all(foreign, ["x"])


@pytest.mark.parametrize("vocab_size", [257, 270, 290])
def test_the_vocabulary_is_as_large_as_asked_and_ids_lie_within(vocab_size):
    trained = tokenizer.train(TEXTS, vocab_size)
    assert trained.get_vocab_size() == vocab_size
    assert set(trained.get_vocab().values()) == set(range(vocab_size))


def test_with_too_little_to_learn_from_the_vocabulary_stays_smaller():
    assert tokenizer.train(["ab"], 300).get_vocab_size() == 258  # 256 bytes, END, and the one pair


def test_learning_shortens_what_was_learnt_from():
    learnt, bytes_ = (len(tokenizer.encode_all(trained, TEXTS)) for trained in (TRAINED, BYTES))
    assert learnt < bytes_ / 2


def test_the_same_texts_give_the_same_tokenizer():
    assert tokenizer.train(TEXTS, 320).to_str() == TRAINED.to_str()


@pytest.mark.parametrize("vocab_size", [0, 1, 256])
def test_a_vocabulary_that_cannot_hold_every_byte_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"at least 257.*got {vocab_size}"):
        tokenizer.train(TEXTS, vocab_size)


def test_a_saved_tokenizer_loads_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} has no tokenizer.json; pass token ids instead"):
        tokenizer.load(tmp_path)
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n\treturn 'é'\n"
    assert tokenizer.load(tmp_path).encode(text).ids == TRAINED.encode(text).ids
