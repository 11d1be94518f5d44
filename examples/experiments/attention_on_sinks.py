"""How much of a question's attention falls on the first tokens of the chunks, layer by layer.

A token that nothing stands before becomes an attention sink. A chunk compiled alone has one, which
linking carries into the prompt (EPIC, arXiv 2410.15332, section 3); LegoLink computes it anew.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from picache import PIC, LinkMethod, Problem
from picache.problem import pieces


@torch.no_grad()
def attention_on_first_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    methods: Mapping[str, LinkMethod],
) -> dict[str, list[float]]:
    """Mean over problems, question tokens and heads, a number a layer: "full" and each method.

    The question is fed behind the linked chunks once more, by transformers' own attention, which
    returns its weights.
    """
    pic = PIC(model, tokenizer, flops_per_byte=None)
    found: dict[str, list[torch.Tensor]] = {"full": [], **{name: [] for name in methods}}
    before = model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    for problem in problems:
        prefix, documents, query = pieces(problem, tokenizer)
        texts = [*([prefix] if prefix else []), *documents]
        chunks = [pic.compile(text, first=not i) for i, text in enumerate(texts)]
        # A BOS in front of a chunk is left out of the prompt, but for the first.
        lengths = [chunk.num_tokens - (chunk.lead if i else 0) for i, chunk in enumerate(chunks)]
        ends = torch.tensor(lengths).cumsum(0)
        firsts, question = ends[:-1], int(ends[-1])
        prompts = {name: pic.link(chunks, query, method) for name, method in methods.items()}
        ids = next(iter(prompts.values())).input_ids
        caches = {"full": model(input_ids=ids[:, :question], logits_to_keep=1).past_key_values}
        for name, prompt in prompts.items():
            caches[name] = _cut(prompt.past_key_values, question)
        model.set_attn_implementation("eager")
        try:
            for name, cache in caches.items():
                layers = model(
                    input_ids=ids[:, question:], past_key_values=cache, output_attentions=True
                ).attentions
                shares = [layer[0, :, :, firsts].sum(-1).mean() for layer in layers]
                found[name].append(torch.stack(shares).cpu())
        finally:
            model.set_attn_implementation(before)
    return {name: torch.stack(rows).mean(0).tolist() for name, rows in found.items()}


def _cut(cache, tokens: int) -> DynamicCache:
    """The first tokens of a cache."""
    kept = DynamicCache()
    for index, layer in enumerate(cache.layers):
        kept.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)
    return kept
