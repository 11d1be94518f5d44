"""Under a tight budget every row of every mode of `generate` does what it does alone."""

import copy

import pytest
import torch

from sparsity import SparseCache
from tests.helpers import assert_close, random_ids
from tests.sparsity.helpers import padded_inputs
from tests.sparsity.zoo import TIGHT

PROMPT, PADS, TOKENS = 13, 5, 14


def inputs():
    return padded_inputs(PROMPT, PADS, 0)


def generate(model, policy, **mode):
    given = {"max_new_tokens": TOKENS, "do_sample": False} | inputs() | mode
    return model.generate(
        **given,
        past_key_values=SparseCache(model, policy),
        return_dict_in_generate=True,
        output_logits=True,
    )


def alone(model, policy, tokens, *widths):
    """Logits after each forward over one row without padding; after `widths` token by token."""
    cache, logits, first = SparseCache(model, policy), [], 0
    widths = [*widths, *[1] * (len(tokens) - sum(widths) - 1)]  # the newest token is not fed
    with torch.no_grad():
        for width in widths:
            new = tokens[None, first : first + width]
            logits.append(model(input_ids=new, past_key_values=cache).logits[0, -1])
            first += width
    return torch.stack(logits)


def rows(sequences, times):
    """Each sequence without its padding, and the width of its prompt."""
    for i, sequence in enumerate(sequences):
        pads = PADS if i // times == 0 else 0
        yield sequence[pads:], PROMPT - pads


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_rows_that_end_early(policy, shallow):
    """The others go on as if nothing had happened, and the row holds its own tokens until then."""
    free = generate(shallow, policy).sequences
    other = free[1, PROMPT:].tolist()
    end = next(token for token in free[0, PROMPT + 1 :].tolist() if token not in other)
    out = generate(shallow, policy, eos_token_id=end).sequences
    ended = [row.tolist().index(end) if end in row.tolist() else None for row in out[:, PROMPT:]]
    assert ended[0] < TOKENS - 1
    assert ended[1] is None
    for row, free_row, at in zip(out[:, PROMPT:], free[:, PROMPT:], ended, strict=True):
        stop = len(row) if at is None else at + 1
        assert torch.equal(row[:stop], free_row[: len(row)][:stop])
        assert (row[stop:] == 0).all()


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_samples(policy, shallow):
    torch.manual_seed(0)
    out = generate(shallow, policy, do_sample=True, num_return_sequences=2, top_k=20)
    assert len({tuple(row.tolist()) for row in out.sequences}) == 4
    logits = torch.stack(out.logits, 1)
    for i, (row, prompt) in enumerate(rows(out.sequences, 2)):
        assert_close(f"sample {i}", logits[i], alone(shallow, policy, row, prompt))


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_beams(policy, shallow):
    """The score of a beam is the score of its tokens, whatever rows it came through."""
    out = generate(shallow, policy, num_beams=4, num_return_sequences=2, output_scores=True)
    assert any(row.unique().numel() > 1 for row in out.beam_indices[:, :TOKENS])
    for i, (row, prompt) in enumerate(rows(out.sequences, 2)):
        chances = alone(shallow, policy, row, prompt).log_softmax(-1)
        score = chances.gather(1, row[prompt:, None]).sum() / TOKENS
        assert_close(f"beam {i}", out.sequences_scores[i], score)


@pytest.mark.parametrize("policy", TIGHT, ids=str)
def test_chunks_and_turns_are_forwards_of_those_widths(policy, shallow):
    ids = random_ids(PROMPT, 1)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    out = generate(shallow, policy, **plain, prefill_chunk_size=5)
    logits = alone(shallow, policy, out.sequences[0], 5, 5, 3)[2:]
    assert_close("chunks", torch.stack(out.logits, 1)[0], logits)
    cache = SparseCache(shallow, policy)
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = shallow.generate(ids, past_key_values=cache, max_new_tokens=4, **given).sequences
    turn = torch.cat([first, random_ids(2, 1, seed=9)], 1)
    fork = copy.deepcopy(cache)
    for one in (cache, fork):
        out = shallow.generate(turn, past_key_values=one, max_new_tokens=TOKENS, **given)
        logits = alone(shallow, policy, out.sequences[0], PROMPT, 1, 1, 1, 3)[4:]
        assert_close("turns", torch.stack(out.logits, 1)[0], logits)
