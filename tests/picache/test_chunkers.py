"""Pieces joined are the text; they fit; boundaries inside a token are told, as each token says."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from picache import PICacheError
from picache.chunkers import by_paragraph, by_seams, by_tokens

PROSE = (
    "The first paragraph has two sentences. This is the second one!\n\n"
    'The second begins here, and "ends here." So it does.\nA line of its own\n  \n'
    "\n   The third stands apart, with a na\u00efve word; is it long? It is.\n"
)
CHUNKERS = {
    "paragraph": lambda text, tokenizer, most: by_paragraph(text, tokenizer),
    "tokens": by_tokens,
    "seams": by_seams,
}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE, which joins a space with the word behind it, and splits rare characters."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([PROSE] * 3, vocab_size=400, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


TEXTS = st.lists(
    st.sampled_from(["The", " first", "sentence", ". ", "!", "\n", "  ", "\u65e5", "\u00ef", "x"]),
    min_size=1,
    max_size=30,
).map("".join).filter(str.strip)  # fmt: skip


@pytest.mark.parametrize("name", CHUNKERS)
@given(text=TEXTS, most=st.integers(1, 9))
@settings(max_examples=60)
def test_joined_the_pieces_are_the_text_and_none_is_too_long(tokenizer, name, text, most):
    cut = CHUNKERS[name](text, tokenizer, most)
    assert "".join(cut.texts) == text
    assert all(cut.texts)
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    begins = [0, *accumulate(map(len, cut.texts))]
    crossed = [
        n for n in range(1, len(cut.texts)) if any(start < begins[n] < end for start, end in spans)
    ]
    assert list(cut.inside) == crossed
    if name == "paragraph":
        return
    for begin, end in pairwise(begins):
        touched = [span for span in spans if span[0] < end and span[1] > begin]
        assert len(touched) <= most or len(set(touched)) == 1  # one character of several tokens


@given(text=TEXTS, most=st.integers(1, 9))
@settings(max_examples=60)
def test_no_cut_at_a_seam_falls_inside_a_token(tokenizer, text, most):
    assert by_seams(text, tokenizer, most).inside == ()


def test_pieces_cut_at_seams_have_the_tokens_of_the_whole(tokenizer):
    """On prose; `picache.seams` looks at 32 characters."""
    for most in range(3, 20):
        pieces = by_seams(PROSE, tokenizer, most).texts
        alone = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
        assert alone == tokenizer(PROSE)["input_ids"]


def test_paragraphs_keep_the_blank_lines_behind_them(tokenizer):
    first, second, third = by_paragraph(f"\n\n{PROSE}\n\n", tokenizer).texts
    assert first.startswith("\n\nThe first")
    assert first.endswith("second one!\n\n")
    assert second.endswith("of its own\n  \n\n   ")
    assert third.startswith("The third")
    assert third.endswith("It is.\n\n\n")
    assert by_paragraph("one line\nand another", tokenizer).texts == ("one line\nand another",)


def test_sentences_are_kept_whole_where_they_fit(tokenizer):
    whole = len(tokenizer(PROSE)["input_ids"])
    assert by_tokens(PROSE, tokenizer, whole).texts == (PROSE,)
    text = "One two. Three four! Five (six?) Seven eight nine"
    most = max(len(tokenizer(part)["input_ids"]) for part in (" Three four!", "One two.")) + 1
    pieces = by_tokens(text, tokenizer, most).texts
    assert pieces[:2] == ("One two.", " Three four!")


def test_a_boundary_inside_a_token_is_told():
    """One of a tokenizer that joins line breaks with what follows them."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "\n": 3, "\nb": 4, "\n\nb": 5}
    bpe = models.BPE(vocabulary, [("\n", "b"), ("\n", "\nb")], unk_token="<unk>")
    across = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    assert across("a\n\nb")["input_ids"] == [1, 5]
    assert by_paragraph("a\n\nb", across).inside == (1,)
    assert by_paragraph("a\n\na", across).inside == ()


def test_a_seam_is_where_both_sides_keep_their_tokens():
    """Of digits in threes, as Llama 3 takes them, "1 23 45" is no "1" in front of "23 4 5"."""
    vocabulary = {"<unk>": 0, **{c: i for i, c in enumerate(" 123459", 1)}, "23": 8, "45": 9}
    bpe = Tokenizer(models.BPE(vocabulary, [("2", "3"), ("4", "5")], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated")
    threes = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert threes.tokenize("9 12345") == ["9", " ", "1", "23", "45"]
    assert threes.tokenize("2345") == ["23", "4", "5"]
    assert by_seams("9 12345", threes, 3).texts == ("9 ", "12345")
    assert by_seams("12345", threes, 1).texts == ("1", "23", "45")  # no other place is left


def test_a_character_of_several_tokens_is_not_cut(tokenizer):
    text = "\u65e5\u672c"
    assert len(tokenizer(text)["input_ids"]) > 2
    for chunker in (by_tokens, by_seams):
        assert chunker(text, tokenizer, 1).texts == ("\u65e5", "\u672c")


@pytest.mark.parametrize("name", CHUNKERS)
def test_what_cannot_be_cut_is_refused(tokenizer, name):
    for text in ("", " \n", None):
        with pytest.raises(PICacheError, match="must not be blank"):
            CHUNKERS[name](text, tokenizer, 5)
    with pytest.raises(PICacheError, match="a fast tokenizer of transformers"):
        CHUNKERS[name]("text", str.split, 5)


@pytest.mark.parametrize("most", [0, -1, 1.5, None])
def test_a_number_of_tokens_that_is_none(tokenizer, most):
    for chunker in (by_tokens, by_seams):
        with pytest.raises(PICacheError, match="whole number of tokens"):
            chunker("text", tokenizer, most)
