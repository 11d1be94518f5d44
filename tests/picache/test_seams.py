"""Where texts meet: tokens of the joined text against those of the texts one by one."""

import re
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from picache import PIC, LegoLink, PICacheError
from picache.seams import Seams, cut_at_seams, ends_of
from tests.helpers import tiny_model

BOS, EOS = "<s>", "</s>"
TEXTS = [
    "the bells are made in Cor",
    "vale, they say.\n\n",
    "a cat\n",
    "\nsat on the mat. ",
    "Who?",
]


def tokenizer_of(adds="$A"):
    """Bytes merged in pairs, as GPT-2 and SmolLM2 do; `adds` says what is put around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["".join(TEXTS) * 3, "Corvale the mat\n\nthe cat"], trainer)
    if adds != "$A":
        special = [(t, tokenizer.token_to_id(t)) for t in (BOS, EOS) if t in adds]
        tokenizer.post_processor = processors.TemplateProcessing(adds, None, special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


BARE = tokenizer_of()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=len(BARE))


def ids(text, tokenizer=BARE):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def cut(given_texts):
    """What is cut; texts that lie wholly inside a token are joined with the one before."""
    try:
        return cut_at_seams(given_texts, BARE, len(BARE))
    except PICacheError as error:
        number = re.match(r"text (\d+), .* lies wholly inside a token", str(error), re.DOTALL)
        if number is None:
            raise
        place = int(number[1])
        joined = given_texts[place - 1] + given_texts[place]
        given_texts[place - 1 : place + 1] = [joined]
        return cut(given_texts)


texts = st.lists(
    st.text(st.sampled_from("theCorvale  \n\n.1é\N{GRINNING FACE}"), min_size=1, max_size=60),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=150)
@given(texts)
def test_cut_ids_joined_are_those_of_the_joined_text(given_texts):
    pieces = cut(given_texts)
    assert list(chain(*pieces)) == ids("".join(given_texts))
    assert len(pieces) == len(given_texts)
    # The slow, obvious twin: where the seams fall on ends of tokens, pieces decode to the texts.
    begins = {len(BARE.decode(list(chain(*pieces[:i])))) for i in range(len(pieces) + 1)}
    lengths = [len("".join(given_texts[:i])) for i in range(len(given_texts) + 1)]
    inside = [length for length in lengths if length not in begins]
    if not inside:
        assert [BARE.decode(piece) for piece in pieces] == given_texts


@settings(deadline=None, max_examples=150)
@given(texts)
def test_what_the_report_counts_is_seen_on_the_whole_texts_too(given_texts):
    found = Seams(BARE).between([ends_of(text) for text in given_texts])
    assert found == tuple(ids(a + b) != ids(a) + ids(b) for a, b in pairwise(given_texts))


def test_a_token_that_straddles_a_seam_goes_to_the_text_in_which_it_begins():
    whole = ids(" Corvale")
    assert len(whole) == 1, "one token, as the texts below must meet inside it"
    pieces = cut_at_seams(["in Cor", "vale is"], BARE, len(BARE))
    assert pieces[0][-1] == whole[0]
    assert BARE.decode(pieces[0]) == "in Corvale"
    assert BARE.decode(pieces[1]) == " is"


def test_a_text_wholly_inside_a_token_is_refused():
    with pytest.raises(PICacheError, match="text 1, 'vale', lies wholly inside a token"):
        cut_at_seams(["in Cor", "vale"], BARE, len(BARE))


@pytest.mark.parametrize("sinks", ["drop", "keep"])
@pytest.mark.parametrize("adds", ["$A", f"{BOS} $A", f"$A {EOS}", f"{BOS} $A {EOS}"])
@pytest.mark.parametrize("begin", ["", BOS])
def test_what_is_cut_links_as_the_joined_text(model, adds, sinks, begin):
    """By ids; special tokens stand where texts compiled one by one have them."""
    tokenizer = tokenizer_of(adds)
    given_texts = [begin + TEXTS[0], *TEXTS[1:-1], f"{BOS} Who?"]
    pic = PIC(model, tokenizer, sinks=sinks, flops_per_byte=None)
    *documents, query = pic.cut(given_texts)
    chunks = [pic.compile(document) for document in documents]
    prompt = pic.link(chunks, query, LegoLink(2))
    bos = tokenizer.bos_token_id
    added = [bos] if adds.startswith(BOS) else []
    bare = ids("".join(given_texts), tokenizer)
    if sinks == "drop":
        assert prompt.input_ids[0].tolist() == (bare if begin else added + bare)
    one_by_one = pic.link([pic.compile(text) for text in given_texts[:-1]], given_texts[-1])
    count = one_by_one.input_ids[0].tolist().count(bos)
    # The last text begins with a BOS of its own: one more would be put in front of it as text.
    extra = 1 if sinks == "keep" and added else 0
    assert prompt.input_ids[0].tolist().count(bos) == count + extra
    assert prompt.report.seams == (None,) * 4


def test_the_report_says_where_the_joined_text_has_other_tokens(model):
    pic = PIC(model, BARE, flops_per_byte=None)
    chunks = [pic.compile(text) for text in TEXTS[:-1]]
    report = pic.link(chunks, TEXTS[-1]).report
    assert report.seams == tuple(ids(a + b) != ids(a) + ids(b) for a, b in pairwise(TEXTS))
    changed = sum(report.seams)
    assert 0 < changed < 4
    assert f"seams: {changed} of 4 have other tokens than the joined text" in str(report)
    # Token ids say nothing of texts.
    known = pic.link([chunks[0], pic.compile(ids(TEXTS[1])), *chunks[2:]], TEXTS[-1]).report
    assert known.seams == (None, None, *report.seams[2:])
    batch = pic.link([chunks, chunks[:1]], [TEXTS[-1], "Who?"]).report
    assert batch.seams == (*report.seams, ids(TEXTS[0] + "Who?") != ids(TEXTS[0]) + ids("Who?"))
    whole = pic.link([pic.compile("the cat")], " sat").report
    assert whole.seams == (False,)
    assert "seams" not in str(whole)


def test_a_seam_is_looked_at_once():
    calls = []

    def tokenizer(text, **kwargs):
        calls.append(text)
        return BARE(text, **kwargs)

    looking = Seams(tokenizer)
    ends = [ends_of(text) for text in TEXTS]
    assert looking.between(ends) == looking.between(ends)
    assert len(calls) == 3 * (len(TEXTS) - 1)
    assert looking.between([ends[0], None, ends[1]]) == (None, None)
    assert looking.between(ends[:1]) == ()


def test_a_chunk_is_found_again_where_its_seams_are_the_same(model):
    pic = PIC(model, BARE)
    for texts_, hit in [
        (["the cat", " in Cor", "vale is", " it"], None),
        (["the mat", " in Cor", "vale is", " it"], True),  # its seams did not change
        (["the cat", " in Cor", "ner is", " it"], False),  # its last token is another
    ]:
        chunk = pic.compile(pic.cut(texts_)[1])
        if hit is None:
            first = chunk
        assert hit is None or (chunk.key == first.key) == hit


@pytest.mark.parametrize(
    ("given_texts", "message"),
    [
        ([], "at least one text"),
        ("the cat", "a list of texts"),
        (["the", ""], "none of them empty"),
        (["the", 3], "a list of texts"),
    ],
)
def test_what_cannot_be_cut_is_refused(model, given_texts, message):
    with pytest.raises(PICacheError, match=message):
        PIC(model, BARE).cut(given_texts)


def test_a_tokenizer_is_needed_that_says_where_tokens_stand(model):
    with pytest.raises(PICacheError, match="has no tokenizer"):
        PIC(model).cut(["the", "cat"])

    class Slow:
        is_fast = False

        def __call__(self, text, **kwargs):
            return {"input_ids": [5] * len(text)}

    with pytest.raises(PICacheError, match="Slow does not say where its tokens stand"):
        PIC(model, Slow()).cut(["the", "cat"])


def test_chunks_of_a_text_and_of_its_ids_are_the_same_chunk(model):
    pic = PIC(model, BARE)
    text, given_ids = pic.compile("the cat"), pic.compile(ids("the cat"))
    assert text == given_ids
    assert text.ends == ("the cat", "the cat")
    assert given_ids.ends is None
    assert torch.equal(torch.tensor(text.ids), torch.tensor(given_ids.ids))
