"""Text that hangs on what stands before it, bytes that make no character, and tokenizers that fail."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from minilib.serving.detokenizer import LONGEST, TextStream

CUT = "\ufffd"
WORDS = ["▁Paris", "▁is", "▁It", "▁a", "▁", "▁▁", "a", "is", "é", "END", ".", "▁the", "▁city", "s"]


def sentencepiece():
    """Llama 2's kind: ▁ for a blank, bytes for what the vocabulary lacks, one leading blank taken away."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    built = tokenizers.Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [], byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    built.add_special_tokens(["<s>", "</s>"])
    return built


LLAMA = sentencepiece()


def ids_of(*names):
    return [LLAMA.token_to_id(f"<0x{name:02X}>" if isinstance(name, int) else name) for name in names]


def bytes_of(text):
    return ids_of(*text.encode())


def streamed(tokenizer, ids, prompt=(), stop=()):
    stream, text = TextStream(tokenizer, stop, prompt), ""
    for token in ids:
        piece, stopped = stream.push(token)
        text += piece
        if stopped:
            return text, True
    piece, stopped = stream.finish()
    return text + piece, stopped


class Counting:
    """A tokenizer that counts the tokens that it is given to decode, and the most at once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.tokens, self.most = tokenizer, 0, 0

    def decode(self, ids):
        self.tokens, self.most = self.tokens + len(ids), max(self.most, len(ids))
        return self.tokenizer.decode(ids)

    def id_to_token(self, token):
        return self.tokenizer.id_to_token(token)


def test_the_oracle_takes_a_leading_blank_away():
    assert LLAMA.decode(ids_of("▁Paris", "▁is")) == "Paris is" and LLAMA.decode(bytes_of("文")) == "文"
    assert LLAMA.decode(ids_of(0x0A, 0xC2, "a")) == CUT * 2 + "a", "it decodes a run of bytes whole or not at all"


@pytest.mark.parametrize("prompt", [ids_of("▁It", "▁is"), ids_of("<s>", "▁It", "</s>"), ids_of("▁It", 0xE6, 0x96)])
def test_the_blank_between_prompt_and_text_is_there(prompt):
    assert streamed(LLAMA, ids_of("▁Paris", "▁is"), prompt) == (" Paris is", False)


@pytest.mark.parametrize("prompt", [[], ids_of("<s>"), ids_of("<s>", 0xC2)])
def test_without_text_in_front_there_is_no_blank(prompt):
    assert streamed(LLAMA, ids_of("▁Paris", "▁is"), prompt) == ("Paris is", False)


def completion(choices):
    """Random words and characters spelt in bytes, all of it text."""
    kinds = [[LLAMA.token_to_id(word)] for word in WORDS] + [bytes_of(text) for text in "é文🙂\n"] + [ids_of("<s>")]
    return [token for _ in range(choices.randrange(1, 40)) for token in choices.choice(kinds)]


@pytest.mark.parametrize("seed", range(300))
def test_pieces_add_up_to_what_prompt_and_text_decode_to_at_once(seed):
    choices = random.Random(seed)
    prompt, text = ([token for _ in range(count) for token in completion(choices)] for count in (1, 2))
    prompt += ids_of("▁city")  # an end of its own: bytes of prompt and text would be one run to the decoder
    whole = LLAMA.decode(prompt + text)
    assert streamed(LLAMA, text, prompt) == (whole[len(LLAMA.decode(prompt)) :], False)
    assert streamed(LLAMA, text) == (LLAMA.decode(text), False)


@pytest.mark.parametrize("seed", range(300))
def test_bytes_that_are_no_text_spoil_no_text_around_them(seed):
    """Every character whose bytes come in order is there, and so is all other text; what is left is \ufffd."""
    choices, ids, expected = random.Random(seed), ids_of("▁a"), "a"
    for _ in range(choices.randrange(1, 30)):
        kind = choices.choice(["word", "character", "noise"])
        if kind == "word":
            ids += ids_of("is")
            expected += "is"
        elif kind == "character":
            ids += bytes_of("文")
            expected += "文"
        else:
            ids += ids_of(*choices.choices([0xFF, 0xC0], k=choices.randrange(1, 9)))  # no character has these
    assert streamed(LLAMA, ids)[0].replace(CUT, "") == expected


@pytest.mark.parametrize(
    "names, text",
    [
        ((0x0A, 0xC2, "a"), "\n" + CUT + "a"),
        ((0xFF, 0xFF, 0xE6, 0x96, 0x87), CUT * 2 + "文"),
        ((0xE6, 0x96, 0x87, 0xFF, "a"), "文" + CUT + "a"),
        ((0xE6, "<s>", 0x96, 0x87), "文"),
        ((0xE6, 0x96), CUT * 2),
    ],
)
def test_bytes_among_text(names, text):
    assert streamed(LLAMA, ids_of(*names)) == (text, False)


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xF0, 0xE6, "é", CUT])
def test_bytes_that_never_make_a_character_cost_the_same_each(byte):
    ids = bytes_of(byte) if isinstance(byte, str) else ids_of(byte)
    counts = []
    for length in (500, 4000):
        counting = Counting(LLAMA)
        streamed(counting, (ids * length)[:length], ids_of("▁is"))
        assert counting.most <= 2 * LONGEST
        counts.append(counting.tokens / length)
    assert counts[1] <= 1.01 * counts[0] and counts[1] <= 40


def test_text_of_a_long_run_of_noise_comes_while_it_lasts():
    stream = TextStream(LLAMA)
    pieces = [stream.push(token)[0] for token in ids_of(0xFF) * 100]
    assert "".join(pieces) == CUT * (100 - LONGEST + 1)


def cut_tokens():
    """A byte-level vocabulary with tokens that end within a character."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "ENDÃ", "Ã©"]  # in bytes: END \xC3, and é
    built = tokenizers.Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    built.decoder = decoders.ByteLevel()
    return built


@pytest.mark.parametrize("stop, text", [(("END",), ""), (("ND",), "E"), (("D" + CUT,), "EN"), ((CUT,), "END")])
def test_a_stop_string_that_ends_before_or_within_a_character_that_is_not_finished(stop, text):
    words = cut_tokens()
    assert words.decode([words.token_to_id("ENDÃ")]) == "END" + CUT
    assert streamed(words, [words.token_to_id("ENDÃ")], stop=stop) == (text, True)


def test_text_in_front_of_a_character_that_is_not_finished_is_given_once():
    words = cut_tokens()
    stream = TextStream(words)
    pieces = [stream.push(words.token_to_id(name))[0] for name in ("ENDÃ", "©", "Ã©")]
    assert pieces == ["END", "é", "é"] and stream.finish() == ("", False)


class Panic(BaseException):
    """What a panic of Rust code is."""


class Failing(Counting):
    """A tokenizer that cannot decode some tokens."""

    def __init__(self, tokenizer, wrong, error):
        super().__init__(tokenizer)
        self.wrong, self.error = wrong, error

    def decode(self, ids):
        if self.wrong.intersection(ids):
            raise self.error
        return super().decode(ids)


@pytest.mark.parametrize("error", [ValueError("no"), Panic("no")])
def test_a_tokenizer_that_fails_costs_the_text_of_its_token_alone(error):
    wrong = set(ids_of("é"))
    failing = Failing(LLAMA, wrong, error)
    ids = ids_of("▁It", "▁is", "é", "▁Paris", 0xE6, "é", "a")
    assert streamed(failing, ids, ids_of("é")) == (f"It is{CUT} Paris{CUT}a", False)
    assert streamed(Failing(LLAMA, set(ids), error), ids) == (CUT * len(ids), False)
