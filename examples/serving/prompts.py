"""A call as the token ids of its pieces: the first chunk, one chunk a document, the query."""

from serving.applications import Call
from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Read the pages and answer the question in a few words."
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the documents while a template is rendered

Ids = list[int]


def pieces(call: Call, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, list[Ids], Ids]:
    """The prompt of a call: what stands first in every prompt, the documents, the query.

    With link or without, the prompt is these ids one after the other, so that answers differ by
    the method and by nothing else.
    """
    before, behind = _around(call.question, tokenizer)
    first = f"{before}{INSTRUCTION}\n"
    texts = [first, *(document_text(each) for each in call.documents), f"{behind}{call.lead}"]
    first_ids, *documents, query = (_ids(text, tokenizer) for text in texts)
    return first_ids, documents, query


def document_text(document: str) -> str:
    """A document as it stands in a prompt; its end keeps tokens from reaching over the seam."""
    return f"{document}\n"


def document_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids of a document in every prompt."""
    return _ids(document_text(document), tokenizer)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _around(question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What stands before the documents, and the question behind them with the answer opened."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", f"{question} "
    turn = [{"role": "user", "content": f"{_MARK}{question}"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, mark, behind = str(whole).partition(_MARK)
    if not mark:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} drops the user's turn")
    return before, behind
