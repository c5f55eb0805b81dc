"""The detokeniser: the pieces join into the whole, no character is split, and the text ends at the stop string."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gllm.runtime.detokenizer import Detokenizer
from gllm.runtime.sampling_params import SamplingParams

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "人工智能 是 未来",
    "smile 😀😀 and 👩‍👩‍👧",
    "STOP and stop ###",
] * 4
SPECIAL = ["<s>", "</s>"]


def byte_level():
    """A byte-level BPE tokenizer, as of Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def sentencepiece():
    """A BPE tokenizer with word marks and byte tokens, as of Llama 2."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorstw", "▁a", "▁b"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("▁", "b")],
        unk_token="<unk>",  # noqa: S106
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


BYTES, WORDS = byte_level(), sentencepiece()
THINK = BYTES.token_to_id("<think>")


def pieces_of(token_ids, tokenizer=BYTES, *, at_once=1, **options):
    """What is given out push by push, the rest, and the detokeniser."""
    detokenizer, pieces = Detokenizer(tokenizer, SamplingParams(max_tokens=None, **options)), []
    for start in range(0, len(token_ids), at_once):
        text, stop = detokenizer.push(token_ids[start : start + at_once])
        pieces.append(text)
        if stop is not None:
            break
    return [*pieces, detokenizer.finish()], detokenizer


def text_of(token_ids, tokenizer=BYTES, **options):
    pieces, detokenizer = pieces_of(token_ids, tokenizer, **options)
    return "".join(pieces), detokenizer.stop


def bytes_as_tokens(text):
    """One token for each byte."""
    alphabet = {char: number for number, char in enumerate(CHARS_OF_BYTES)}
    assert len(alphabet) == 256
    return [BYTES.token_to_id(CHARS_OF_BYTES[byte]) for byte in text.encode()]


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS_OF_BYTES = [""] * 256
for _number, _byte in enumerate([*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE)]):
    CHARS_OF_BYTES[_byte] = chr(_byte) if _number < len(PRINTABLE) else chr(256 + _number - len(PRINTABLE))


# Without a stop string.


@settings(max_examples=300, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, BYTES.get_vocab_size() + 3), max_size=40),
    skips=st.booleans(),
    at_once=st.integers(1, 5),
)
@example(token_ids=[BYTES.token_to_id(CHARS_OF_BYTES[0xE4])], skips=False, at_once=1)
@example(token_ids=[0, 1, 1, 0], skips=True, at_once=2)
def test_any_tokens_join_into_their_decoding(token_ids, skips, at_once):
    text, _ = text_of(token_ids, at_once=at_once, skip_special_tokens=skips)
    assert text == BYTES.decode(token_ids, skip_special_tokens=skips)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_text_comes_back_and_no_character_is_split(text):
    pieces, _ = pieces_of(bytes_as_tokens(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", " ", "  ", "lord", "é", "人", "😀", "</s>"]), max_size=20))
@example([" ", "a"])
@example(["</s>", "a", "</s>", " b"])
def test_word_marks_become_the_same_spaces(parts):
    token_ids = WORDS.encode("".join(parts), add_special_tokens=False).ids
    assert text_of(token_ids, WORDS)[0] == WORDS.decode(token_ids)
    assert text_of(token_ids, WORDS, skip_special_tokens=False)[0] == WORDS.decode(token_ids, skip_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, WORDS.get_vocab_size() - 1), max_size=30))
def test_bytes_that_form_no_character_break_nothing(token_ids):
    text, _ = text_of(token_ids, WORDS)
    plain = [token for token in token_ids if not 3 <= token < 259]
    if plain == token_ids:
        assert text == WORDS.decode(token_ids)
    tail = WORDS.encode("held", add_special_tokens=False).ids
    assert text_of([*token_ids, *tail], WORDS)[0].endswith("held")


def test_text_that_is_out_is_not_taken_back():
    byte_tokens = [WORDS.token_to_id(f"<0x{byte:02X}>") for byte in [*"人".encode(), 0xE4]]
    token_ids = [*byte_tokens, *WORDS.encode("abc", add_special_tokens=False).ids]
    assert WORDS.decode(token_ids) == "\ufffd" * 4 + " abc"  # one bad byte spoils the bytes before it
    pieces, _ = pieces_of(token_ids, WORDS)
    assert pieces == ["", "", "人", "", "\ufffd a", "b", "c", ""]


def test_text_flows_and_characters_wait_for_their_last_byte():
    pieces, _ = pieces_of(bytes_as_tokens("a人b"))
    assert pieces == ["a", "", "", "人", "b", ""]
    pieces, _ = pieces_of(bytes_as_tokens("a人")[:-1])
    assert pieces == ["a", "", "", "\ufffd"]


def test_special_tokens_show_only_when_asked_for():
    token_ids = [0, *BYTES.encode("the").ids, THINK, 1]
    assert text_of(token_ids)[0] == "the<think>"
    assert text_of(token_ids, skip_special_tokens=False)[0] == "<s>the<think></s>"


def test_transformers_tokenizers_are_taken():
    fast = PreTrainedTokenizerFast(tokenizer_object=BYTES, eos_token="</s>")  # noqa: S106
    token_ids = [*fast.encode("the lazy 😀", add_special_tokens=False), fast.eos_token_id]
    assert text_of(token_ids, fast)[0] == fast.decode(token_ids, skip_special_tokens=True) == "the lazy 😀"


def test_a_tokenizer_that_cannot_stream_is_refused():
    with pytest.raises(ValueError, match="the tokenizer is a dict; text is streamed by a fast one"):
        Detokenizer({}, SamplingParams())


def test_no_text_if_none_is_wanted():
    pieces, detokenizer = pieces_of([50, 51], detokenize=False)
    assert pieces == ["", "", ""]
    assert detokenizer.num_tokens == 2


def test_a_long_run_of_special_tokens_stays_cheap():
    start = time.process_time()
    text_of([1] * 20_000)
    assert time.process_time() - start < 2


# Stop strings.


def first_stop(text, stops):
    """Where the stop string that ends first begins and ends."""
    ends = range(len(text) + 1)
    return min(((end, end - len(stop)) for stop in stops for end in ends if text[:end].endswith(stop)), default=None)


LETTERS = st.text("ab☃", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab☃", max_size=24),
    stops=st.lists(LETTERS, min_size=1, max_size=3),
    includes=st.booleans(),
    at_once=st.integers(1, 4),
)
@example(text="aabaab☃", stops=["aab☃"], includes=False, at_once=1)
@example(text="abab", stops=["b", "aba"], includes=False, at_once=4)
def test_the_text_ends_at_the_first_stop_string(text, stops, includes, at_once):
    token_ids = bytes_as_tokens(text)
    got = text_of(token_ids, at_once=at_once, stop=stops, include_stop_str_in_output=includes)
    found = first_stop(text, stops)
    if found is None:
        assert got == (text, None)
    else:
        end, start = found
        assert got == (text[: end if includes else start], text[start:end])


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab☃", max_size=16), stops=st.lists(LETTERS, min_size=1, max_size=2), min_tokens=st.integers(0, 20))
@example(text="aac", stops=["aab", "a"], min_tokens=2)  # the held-back end holds a stop string that came too early
def test_stop_strings_wait_for_min_tokens(text, stops, min_tokens):
    num_pushed, expected = 0, (text, None)
    for end in range(1, len(text) + 1):
        num_pushed += len(text[end - 1].encode())
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if num_pushed > min_tokens and found:
            stop = max(found, key=len)
            expected = (text[: end - len(stop)], stop)
            break
    assert text_of(bytes_as_tokens(text), stop=stops, min_tokens=min_tokens) == expected


@settings(max_examples=100, deadline=None)
@given(st.text("ab☃", max_size=20), LETTERS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text, stop):
    detokenizer, given_out, pushed = Detokenizer(BYTES, SamplingParams(stop=stop)), "", ""
    for char in text:
        piece, found = detokenizer.push(bytes_as_tokens(char))
        given_out, pushed = given_out + piece, pushed + char
        if found:
            return
        assert pushed.startswith(given_out)
        held = pushed[len(given_out) :]
        assert stop.startswith(held)
        assert not any(stop.startswith(pushed[-num:]) for num in range(len(held) + 1, len(stop)) if num <= len(pushed))


def test_a_stop_string_inside_one_token():
    token_ids = [*BYTES.encode("fox ").ids, THINK, *BYTES.encode("dog").ids]
    assert text_of(token_ids, stop="hin") == ("fox <t", "hin")
    assert text_of(token_ids, stop="hin", include_stop_str_in_output=True) == ("fox <thin", "hin")
    assert text_of(token_ids, stop=["k>", "<t"]) == ("fox ", "<t")
    assert text_of(token_ids, stop=["<think", "h"]) == ("fox <t", "h")  # the one that ends first


def test_a_stop_string_over_several_tokens():
    token_ids = bytes_as_tokens("one ### two")
    pieces, detokenizer = pieces_of(token_ids, stop=" ###")
    assert pieces == ["o", "n", "e", "", "", "", "", ""]
    assert (detokenizer.stop, detokenizer.num_tokens) == (" ###", 7)


def test_what_was_held_back_is_given_out_when_it_is_no_stop_string():
    assert pieces_of(bytes_as_tokens("a##b#"), stop="###")[0] == ["a", "", "", "##b", "", "#"]


def test_tokens_after_the_stop_string_are_not_taken():
    detokenizer = Detokenizer(BYTES, SamplingParams(stop="b"))
    assert detokenizer.push(bytes_as_tokens("abc")) == ("a", "b")
    assert detokenizer.num_tokens == 2
    assert detokenizer.push(bytes_as_tokens("d")) == ("", "b")
    assert detokenizer.finish() == ""


def test_a_stop_string_seen_only_at_the_end_still_cuts():
    sharp = BYTES.token_to_id("#")
    lone = bytes_as_tokens("人")[:1]
    detokenizer = Detokenizer(BYTES, SamplingParams(stop="#\ufffd"))
    assert detokenizer.push([*bytes_as_tokens("a"), sharp, *lone]) == ("a", None)
    assert detokenizer.finish() == ""
    assert detokenizer.stop == "#\ufffd"
