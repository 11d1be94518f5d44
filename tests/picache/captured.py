"""What tests of captured passes share: models, prompts, and when two of them are the same."""

import sys
import threading
from pathlib import Path

from picache import PIC
from tests.picache.helpers import compiled, prompt_parts

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "experiments"))
import families  # noqa: F401 - the examples are scripts, not a package

ABSOLUTE = 1e-5
TAKEN = [
    "Llama 3 (llama3 RoPE)",
    "Qwen2",
    "Qwen3",
    "Mistral (sliding)",
    "Gemma 2",  # soft cap and window
    "Gemma 3",
    "GPT-OSS",  # sinks and window
    "Phi",  # partly rotated
    "GLM",
    "Phi-3",
    "DeepSeek V3",  # latents
    "SmolLM3",  # some layers without positions
]


def pic_and_parts(model, lengths=(7, 20, 33, 1, 18), query=9):
    pic = PIC(model, flops_per_byte=None)
    documents, question = prompt_parts(lengths, query)
    return pic, compiled(pic, documents), question


def linked_in_threads(pic, asked, method, times):
    """What each of `asked` gives, linked so many times in a thread of its own; by its place."""
    found = {which: [] for which in range(len(asked))}

    def link(which):
        for _ in range(times):
            found[which].append(pic.link(*asked[which], method))

    threads = [threading.Thread(target=link, args=(which,)) for which in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_same(actual, expected):
    assert (actual.logits - expected.logits).abs().max() <= ABSOLUTE
    assert_same_kv(actual.past_key_values, expected.past_key_values)


def assert_same_kv(actual, expected, bound=ABSOLUTE):
    for ours, theirs in zip(actual.kv, expected.kv, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= bound
