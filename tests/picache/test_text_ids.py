"""Texts are linked as the tokenizer gives the whole text: only what it added is left out."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from picache import PIC, DummySinks, FullRecompute, PICacheError, SharedPrefix
from tests.helpers import assert_close, tiny_model

BOS, EOS = "<|im_start|>", "<|im_end|>"
WORDS = "system user assistant you are kind where is the cat on mat a b c d e f g".split()
VOCABULARY = {word: index for index, word in enumerate(["<pad>", BOS, EOS, "<unk>", *WORDS])}


def tokenizer_that_adds(template):
    """A tokenizer of words; `template` says what it adds around a text."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template != "$A":
        special = [(token, VOCABULARY[token]) for token in (BOS, EOS) if token in template]
        tokenizer.post_processor = processors.TemplateProcessing(template, None, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>"
    )


ADDING = {
    "nothing": "$A",
    "a BOS": f"{BOS} $A",
    "an EOS": f"$A {EOS}",
    "both": f"{BOS} $A {EOS}",
}
CHAT = [f"{BOS} system you are kind {EOS} ", f"{BOS} user the cat is on the mat {EOS} "]
QUESTION = f"{BOS} user where is the cat {EOS} {BOS} assistant"
PLAIN = ["you are kind ", "the cat is on the mat "]
PLAIN_QUESTION = "where is the cat"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def link(model, tokenizer, chunks, question, **arguments):
    pic = PIC(model, tokenizer, flops_per_byte=None, **arguments)
    return pic.link([pic.compile(chunk) for chunk in chunks], question, FullRecompute())


def whole(tokenizer, texts):
    """What the tokenizer gives for the whole text, less an EOS, behind which nothing is said."""
    ids = tokenizer("".join(texts))["input_ids"]
    bare = tokenizer("".join(texts), add_special_tokens=False)["input_ids"]
    return ids[: len(ids) - (ids[-1] == VOCABULARY[EOS] != bare[-1])]


@pytest.mark.parametrize("adds", ADDING)
@pytest.mark.parametrize("sinks", ["drop", DummySinks(2), SharedPrefix("you are")], ids=repr)
def test_plain_texts_are_linked_as_one_text(model, adds, sinks):
    tokenizer = tokenizer_that_adds(ADDING[adds])
    prompt = link(model, tokenizer, PLAIN, PLAIN_QUESTION, sinks=sinks)
    assert prompt.input_ids[0].tolist() == whole(tokenizer, [*PLAIN, PLAIN_QUESTION])
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(prompt.input_ids).logits[:, -1])


@pytest.mark.parametrize("adds", ["nothing", "an EOS"])
@pytest.mark.parametrize("sinks", ["drop", DummySinks(2), SharedPrefix("you are")], ids=repr)
def test_chat_turns_that_open_with_the_bos_keep_their_opener(model, adds, sinks):
    """The BOS of SmolLM2 opens every turn; the tokenizer adds none."""
    tokenizer = tokenizer_that_adds(ADDING[adds])
    prompt = link(model, tokenizer, CHAT, QUESTION, sinks=sinks)
    assert prompt.input_ids[0].tolist() == whole(tokenizer, [*CHAT, QUESTION])
    assert prompt.input_ids[0].tolist().count(VOCABULARY[BOS]) == 4
    with torch.no_grad():
        assert_close("logits", prompt.logits, model(prompt.input_ids).logits[:, -1])


@pytest.mark.parametrize("adds", ["a BOS", "both"])
@pytest.mark.parametrize("sinks", ["drop", "keep", DummySinks(2)], ids=repr)
def test_a_template_that_is_rendered_already_gets_no_second_bos(model, adds, sinks):
    tokenizer = tokenizer_that_adds(ADDING[adds])
    prompt = link(model, tokenizer, CHAT, QUESTION, sinks=sinks)
    rendered = tokenizer("".join([*CHAT, QUESTION]), add_special_tokens=False)["input_ids"]
    assert prompt.input_ids[0].tolist() == rendered
    bos, eos = VOCABULARY[BOS], VOCABULARY[EOS]
    dropped = (bos, eos) if adds == "both" else (bos,)
    assert prompt.report.dropped == (dropped,) * 3


def test_an_eos_that_the_tokenizer_adds_ends_neither_chunk_nor_query(model):
    tokenizer = tokenizer_that_adds(ADDING["both"])
    bos, eos = VOCABULARY[BOS], VOCABULARY[EOS]
    prompt = link(model, tokenizer, PLAIN, PLAIN_QUESTION)
    assert eos not in prompt.input_ids
    assert prompt.report.dropped == ((eos,), (bos, eos), (bos, eos))
    assert f"left out: 5 special tokens ({eos}, {bos}, {eos}, {bos}, {eos})" in str(prompt.report)
    kept = link(model, tokenizer, PLAIN, PLAIN_QUESTION, sinks="keep")
    assert kept.report.dropped == ((eos,),) * 3
    assert kept.input_ids[0].tolist().count(bos) == 3
    batch = link_batch(model, tokenizer)
    assert batch.report.dropped == ((eos,), (bos, eos)) * 2
    silent = link(model, tokenizer_that_adds("$A"), PLAIN, PLAIN_QUESTION)
    assert silent.report.dropped == ((), (), ())
    assert "left out" not in str(silent.report)


def link_batch(model, tokenizer):
    pic = PIC(model, tokenizer)
    return pic.link([[pic.compile(text)] for text in PLAIN], [PLAIN_QUESTION] * 2)


@pytest.mark.parametrize("adds", ADDING)
def test_ids_of_the_tokenizer_are_linked_as_the_text(model, adds):
    """An EOS stays: nobody knows that it was added. A BOS is one that this tokenizer adds."""
    tokenizer = tokenizer_that_adds(ADDING[adds])
    texts, question = (CHAT, QUESTION) if adds == "nothing" else (PLAIN, PLAIN_QUESTION)
    ids = [tokenizer(text)["input_ids"] for text in (*texts, question)]
    front = "BOS" in adds or adds == "both"
    expected = [*ids[0], *ids[1][front:], *ids[2][front:]]
    for given in (
        ids,
        [torch.tensor(one) for one in ids],
        [torch.tensor([one]) for one in ids],
        [torch.tensor(one).numpy() for one in ids],
        [tokenizer(text) for text in (*texts, question)],
        [tokenizer(text, return_tensors="pt") for text in (*texts, question)],
    ):
        prompt = link(model, tokenizer, given[:2], given[2])
        assert prompt.input_ids[0].tolist() == expected


def test_without_a_tokenizer_a_leading_bos_of_ids_is_taken_as_added(model):
    bos = model.config.bos_token_id
    prompt = link(model, None, [[bos, 5, 6], [bos, 7, 8]], [bos, 9])
    assert prompt.input_ids[0].tolist() == [bos, 5, 6, 7, 8, 9]
    assert prompt.report.dropped == ((), (bos,), (bos,))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (BatchEncoding({"input_ids": [[3, 4], [5, 6]]}), r"got shape \(2, 2\)"),
        (BatchEncoding({"attention_mask": [1]}), "BatchEncoding without input_ids"),
        (
            BatchEncoding({"input_ids": [0, 4], "attention_mask": [0, 1]}),
            "is padded: tokenize it without padding",
        ),
        (torch.zeros(1, 0, dtype=torch.int64), "is empty"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), r"got shape \(1, 2, 2\)"),
        ("", "is empty"),
        (np.ma.array([3, 4, 5], mask=[0, 1, 0]), "has masked entries"),
        (np.array([3, 4], dtype=complex), "dtype torch.complex128"),
        (np.array([3, 4], dtype="timedelta64[s]"), "must be a text, a list of token ids"),
        (np.array([3, "a"], dtype=object), "must be a text, a list of token ids"),
        ([2**70], "must be a text, a list of token ids"),
    ],
)
def test_what_is_no_single_text_is_refused(model, given, says):
    pic = PIC(model, tokenizer_that_adds("$A"))
    with pytest.raises(PICacheError, match=says):
        pic.compile(given)
    with pytest.raises(PICacheError, match=says):
        pic.link([pic.compile([3, 4])], given)


def test_a_text_of_nothing_is_its_bos_alone(model):
    pic = PIC(model, tokenizer_that_adds(ADDING["both"]))
    nothing = pic.compile("")
    assert nothing.ids == (VOCABULARY[BOS],)
    with pytest.raises(PICacheError, match="the query is only a BOS"):
        pic.link([nothing], "")
    with pytest.raises(PICacheError, match="at place 1 is only a BOS"):
        pic.link([nothing, nothing], PLAIN_QUESTION)


def test_a_tokenizer_that_hides_what_it_added_is_refused(model):
    class Hiding:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, 7, 8] if add_special_tokens else [9]}

    with pytest.raises(PICacheError, match=r"Hiding gives a document other tokens.*give token ids"):
        PIC(model, Hiding()).compile("the cat")
    with pytest.raises(PICacheError, match="cannot be called as transformers' are"):
        PIC(model, lambda text: [1]).compile("the cat")
