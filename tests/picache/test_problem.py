"""Prompts in pieces under chat templates, and the tokens an answer goes on by."""

import pytest
from tokenizers import processors

from picache import PICacheError, Problem
from picache.problem import answer_ids, pieces
from tests.picache.test_compare import CHAT, tokenizer_of

PROBLEM = Problem(("the cat sits ", " the dog"), "where is the cat", ("mat",), "a b", "on the")
STRIPS = CHAT.replace("m['content']", "m['content'] | trim")
TWICE = CHAT.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}")
NEVER = CHAT.replace("{{ m['content'] }}", "who is it")
THINKS = CHAT + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"


def whole(problem, template):
    """The rendering with the documents where they belong, by the template itself."""
    content = f"{problem.instruction}\n" if problem.instruction else ""
    content += "".join(f"{d}\n" for d in problem.documents) + problem.question
    turn = [{"role": "user", "content": content}]
    rendered = tokenizer_of(template).apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return rendered + problem.lead


@pytest.mark.parametrize("template", [CHAT, STRIPS, THINKS], ids=["plain", "strips", "thinks"])
@pytest.mark.parametrize("instruction", ["", " a b "])
@pytest.mark.parametrize("question", ["where is the cat", "who sits \n"])
def test_pieces_joined_are_what_the_template_renders(template, instruction, question):
    problem = Problem(PROBLEM.documents, question, instruction=instruction, lead="on the")
    prefix, documents, query = pieces(problem, tokenizer_of(template))
    assert prefix + "".join(documents) + query == whole(problem, template)
    assert documents == ("the cat sits \n", " the dog\n")
    assert query.endswith("on the")
    assert "<think>" not in query


@pytest.mark.parametrize("template", [TWICE, NEVER])
def test_a_template_that_changes_what_users_write_is_refused(template):
    with pytest.raises(PICacheError, match=r"documents cannot be placed in 'where is the cat'"):
        pieces(PROBLEM, tokenizer_of(template))


def test_the_mark_in_a_question_is_refused_and_in_a_document_is_text():
    with pytest.raises(PICacheError, match=r"has 2 places for them. Leave U\+FFFC out"):
        pieces(Problem(("a",), "what is \ufffc"), tokenizer_of(CHAT))
    problem = Problem(("a picture \ufffc",), "who")
    assert pieces(problem, tokenizer_of(CHAT)).documents == ("a picture \ufffc\n",)


@pytest.mark.parametrize("template", [None, CHAT])
@pytest.mark.parametrize("lead", ["", "on the"])
def test_the_answer_goes_on_from_the_query_without_special_tokens(template, lead):
    tokenizer = tokenizer_of(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A <unk>", None, [("<s>", 0), ("<unk>", 1)]
    )
    problem = Problem(("the cat",), "where", ("mat", "roof"), lead=lead)
    assert answer_ids(problem, tokenizer) == tokenizer.convert_tokens_to_ids(["mat"])


class Letters:
    """Tokens are letters, but for the pairs that merge."""

    chat_template = None
    bos_token = None

    def __init__(self, *pairs):
        self.pairs = pairs

    def __call__(self, text, add_special_tokens=True):
        ids, place = [], 0
        while place < len(text):
            size = 2 if text[place : place + 2] in self.pairs else 1
            ids.append(text[place : place + size])
            place += size
        return {"input_ids": ids}


@pytest.mark.parametrize(
    ("question", "lead", "pairs", "expected"),
    [
        ("q?", "", (" m",), [" m", "a"]),  # a space between, and it belongs to the answer
        ("q?\n", "", (" m",), ["m", "a"]),  # a new line: no space
        ("q?", "is", (" m", "s "), [" m", "a"]),  # "s" would become "s ": the answer's own tokens
        ("q?", "is ", (" m",), ["m", "a"]),  # the lead's space stays the lead's
    ],
)
def test_a_space_stands_before_an_answer_where_a_word_ends(question, lead, pairs, expected):
    problem = Problem(("d",), question, ("ma",), lead=lead)
    assert answer_ids(problem, Letters(*pairs)) == expected


@pytest.mark.parametrize("name", ["question", "instruction", "lead"])
def test_what_is_no_text_is_named(name):
    with pytest.raises(PICacheError, match=f"{name} must be a text, got None"):
        Problem(**{"documents": ("d",), "question": "q", name: None})
