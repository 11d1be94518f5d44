"""What every retention policy costs a model that reasons in words: problems solved, by budget.

    python examples/experiments/reasoning_accuracy.py --out docs/results
    python examples/experiments/reasoning_accuracy.py --out rehearsal --problems 4 --budgets 256

The model is SmolLM2 with the adapter of `train_reasoning_adapter.py`, which writes out every step;
the problems are 200 that training never saw. A problem counts as solved where greedy decoding
writes the taught chain to its last number. Decoding freely does that exactly if at each token of
the chain, forced, the taught token is the likeliest, which is what is measured: with the code that
runs under `SparseCache`, all policies along the same texts (`layer_by_layer.py`). A chain with an
error may come to the right number all the same, and what is written behind it does not count. How
many lines have no wrong token tells more where hardly anything is solved. A prompt that a policy
pins and that its budget cannot hold is refused, problem by problem. Beyond `--seconds` nothing new
begins; the next call goes on from what stands in --out. Writes `reasoning_accuracy.json` and
`reasoning_accuracy.png`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from environment import environment
from growing_record import GrowingRecord, read
from layer_by_layer import Texts, Walk, hidden_states
from loaded import loaded
from reasoning_accuracy_summary import DENSE, draw, summary, tables
from retention_ways import REASONING, Way
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from word_problems import WordProblem, prompt_ids, unseen

from sparsity import SparsityError
from sparsity.retention.batch_rows import BatchRows, plan

MEASURED = "reasoning_accuracy_problems.json.gz"
ADAPTER = Path(__file__).parents[1] / "reasoning_adapter"


@dataclass(frozen=True)
class Chains:
    """Some problems with their chains, as texts of equal length.

    Attributes:
        numbers: of the problems.
        texts: a prompt with padding in front, the chain, and behind it ends of text, which are
            tokens like others: they come after all that is marked.
        lines: of each token behind the prompt the line of its chain, int64 `[rows, tokens]`; -1
            for padding.
    """

    numbers: list[int]
    texts: Texts
    lines: Tensor

    def of(self, rows: list[int]) -> "Chains":
        """Some of the rows; padding in front that all of them have stays."""
        at = torch.tensor(rows, device=self.texts.ids.device)
        real = self.texts.real
        assert real is not None
        texts = Texts(self.texts.ids[at], self.texts.prompt_tokens, real[at])
        return Chains([self.numbers[i] for i in rows], texts, self.lines[rows])


def chains(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[WordProblem],
    numbers: list[int],
    device: torch.device,
) -> Chains:
    """Problems, of about the same length, with their chains."""
    asked = [prompt_ids(tokenizer, problems[i].question) for i in numbers]
    taught = [
        tokenizer(problems[i].solution, add_special_tokens=False, return_offsets_mapping=True)
        for i in numbers
    ]
    prompt = max(map(len, asked))
    tokens = prompt + max(len(one["input_ids"]) for one in taught)
    ids = torch.full((len(numbers), tokens), tokenizer.eos_token_id)
    real = torch.ones_like(ids, dtype=torch.bool)
    lines = torch.full((len(numbers), tokens - prompt), -1)
    for row, (before, chain) in enumerate(zip(asked, taught, strict=True)):
        real[row, : prompt - len(before)] = False
        ids[row, prompt - len(before) : prompt] = torch.tensor(before)
        behind = chain["input_ids"]
        ids[row, prompt : prompt + len(behind)] = torch.tensor(behind)
        solution = problems[numbers[row]].solution
        lines[row, : len(behind)] = torch.tensor(
            [solution.count("\n", 0, first) for first, _ in chain["offset_mapping"]]
        )
    return Chains(numbers, Texts(ids.to(device), prompt, real.to(device)), lines)


@torch.no_grad()
def likeliest(model: PreTrainedModel, texts: Texts, states: Tensor) -> Tensor:
    """The likeliest token at each place behind the prompt, int64 `[rows, tokens]`, on the CPU."""
    head: Any = model.get_output_embeddings()
    first = texts.prompt_tokens - 1
    parts = states[:, first:-1].split(64, dim=1)
    return torch.cat([head(part).argmax(-1).cpu() for part in parts], 1)


def marks(chain: Chains, found: Tensor) -> list[dict]:
    """Of each problem whether all of its chain is found, and what share of its lines.

    Args:
        chain: some problems.
        found: the likeliest tokens, int64 `[rows, tokens]`.
    """
    wrong = found != chain.texts.ids[:, chain.texts.prompt_tokens :].cpu()
    marked = []
    for number, bad, line in zip(chain.numbers, wrong, chain.lines, strict=True):
        lines, missed = int(line.max()) + 1, set(line[bad & (line >= 0)].tolist())
        marked.append(
            {
                "problem": number,
                "solved": float(not missed),
                "lines_right": 1 - len(missed) / lines,
            }
        )
    return marked


@cache
def reasoner(name: str, adapter: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with the adapter merged into it: on a GPU in bf16, as trained, else in fp32."""
    from peft import PeftModel  # takes seconds, and the tables need none of it

    model, tokenizer = loaded(name, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval(), tokenizer


def fits(way: Way, budget: int, prompt_tokens: int, tokens: int) -> bool:
    """Whether a policy takes a prompt of so many tokens and so many more behind it."""
    try:
        step = plan(BatchRows(), way.policy(budget), 1, prompt_tokens, None, torch.device("cpu"))
    except SparsityError:
        return False
    return step.then.room is None or step.then.room >= tokens


def measured(
    model: PreTrainedModel, groups: Sequence[Chains], ways: Sequence[Way], budget: int
) -> list[dict]:
    """A row for each way: the marks of the problems that it takes, the numbers of the others."""
    begun = time.perf_counter()
    rows = [{"arm": way.label, "budget": budget, "problems": [], "refused": []} for way in ways]
    for chain in groups:
        together: dict[tuple[int, ...], list[int]] = {}
        first = chain.texts.prompt_tokens
        lengths, behind = chain.texts.real[:, :first].sum(1).tolist(), chain.lines.shape[1]
        for index, way in enumerate(ways):
            taken = tuple(i for i, one in enumerate(lengths) if fits(way, budget, one, behind))
            together.setdefault(taken, []).append(index)
            rows[index]["refused"] += [n for i, n in enumerate(chain.numbers) if i not in taken]
        for taken, indices in together.items():
            if not taken:
                continue
            part = chain.of(list(taken))
            walks = [Walk(model, ways[index].policy(budget), part.texts) for index in indices]
            states = hidden_states(model, part.texts, walks)
            for index, one in zip(indices, states, strict=True):
                rows[index]["problems"] += marks(part, likeliest(model, part.texts, one))
    seconds = (time.perf_counter() - begun) / len(ways)
    at_once = max(len(chain.numbers) for chain in groups)
    return [row | {"seconds": seconds, "at_once": at_once} for row in rows]


def whole(row: dict, problems: int) -> bool:
    """Whether an arm was measured on all problems, or refused them one by one."""
    return len(row["problems"]) + len(row.get("refused", [])) == problems


def put(rows: list[dict], new: list[dict]) -> list[dict]:
    """The rows with new ones, which stand for those of the same arm and budget."""
    anew = {(row["arm"], row["budget"]) for row in new}
    return [row for row in rows if (row["arm"], row["budget"]) not in anew] + new


def run(args: argparse.Namespace) -> dict:
    """Every arm, written as it comes; a later call of the same configuration goes on from there."""
    begun = time.time()
    model, tokenizer = reasoner(args.model, args.adapter)
    problems = unseen(args.seed, args.problems, tuple(args.steps))
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].uses))
    groups = [
        chains(tokenizer, problems, order[first : first + args.rows], model.device)
        for first in range(0, len(order), args.rows)
    ]
    names = ("model", "seed", "problems", "steps")
    record = {
        "configuration": {name: getattr(args, name) for name in names},
        "environment": environment(),
        "seconds": 0.0,
        "tokens": {
            str(number): [int(real.sum()), int((line >= 0).sum())]
            for chain in groups
            for number, real, line in zip(
                chain.numbers,
                chain.texts.real[:, : chain.texts.prompt_tokens],
                chain.lines,
                strict=True,
            )
        },
        "rows": [],
    }
    growing = GrowingRecord(args.out / MEASURED, record, ["rows"])
    done = {(row["arm"], row["budget"]) for row in record["rows"] if whole(row, args.problems)}
    if (DENSE, 0) not in done:
        found = [
            mark
            for chain in groups
            for mark in marks(
                chain, likeliest(model, chain.texts, hidden_states(model, chain.texts)[0])
            )
        ]
        record["rows"] = put(record["rows"], [{"arm": DENSE, "budget": 0, "problems": found}])
        growing.write()
    left = [
        (budget, [way for way in REASONING if (way.label, budget) not in done])
        for budget in args.budgets
    ]
    turns = [
        (budget, ways[first : first + args.together])
        for budget, ways in left
        for first in range(0, len(ways), args.together)
    ]
    for budget, ways in tqdm(turns, desc="turns"):
        if time.time() > begun + args.seconds:
            break
        record["rows"] = put(record["rows"], measured(model, groups, ways, budget))
        growing.write()
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of a LoRA adapter")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs=2, default=[13, 46], help="of a problem")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 256, 1024, 128])
    parser.add_argument("--rows", type=int, default=100, help="problems at once")
    parser.add_argument("--together", type=int, default=6, help="arms side by side")
    parser.add_argument("--seconds", type=float, default=3e7, help="after which nothing begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--measured", type=Path, help="what --out wrote before: only sum it up")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = run(args) if args.measured is None else read(args.measured)
    summed = summary(record)
    (args.out / "reasoning_accuracy.json").write_text(json.dumps(summed, indent=1) + "\n")
    draw(summed, args.out / "reasoning_accuracy.png")
    print(tables(summed))


if __name__ == "__main__":
    main()
