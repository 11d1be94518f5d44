"""Teach a small model to reason in words: a LoRA adapter, on one GPU, in a quarter of an hour.

    python examples/experiments/train_reasoning_adapter.py --out examples/reasoning_adapter

The problems are those of `word_problems.py`, drawn as they are needed; the loss is that of the
chain of thought alone. Writes the adapter (bf16 safetensors, by peft) and `training.json`: command,
seed, curve, hardware, and how many of 200 problems of another seed are answered rightly by greedy
decoding with dense attention, with the adapter as it was saved.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from environment import environment
from loaded import loaded
from models import load
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override
from word_problems import (
    WordProblem,
    end_id,
    final_answer,
    prompt_ids,
    unseen,
    word_problem,
)

RECORD = "training.json"
IGNORE = -100
SHORT = 0.25
"""Share of problems that are shorter than those that are asked, from which the steps are learnt."""
POOL = 256
"""Problems that are sorted by length, so that those of a batch are padded little."""


class Problems(IterableDataset):
    """Batches of problems without end: ids and labels, int64 ``[problems, tokens]``, padded behind.

    Args:
        tokenizer: of the model.
        steps: the fewest and the most of the problems that are asked.
        tokens: of a batch, padding included.
        seed: of the problems; each worker has its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, steps: tuple[int, int], tokens: int, seed: int
    ) -> None:
        self._tokenizer, self._steps, self._tokens, self._seed = tokenizer, steps, tokens, seed
        self._end = end_id(tokenizer)  # once: it takes the whole vocabulary

    @override
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self._seed} {0 if worker is None else worker.id}")
        while True:
            pool = sorted((self._example(rng) for _ in range(POOL)), key=lambda one: len(one[0]))
            batches: list[list[tuple[list[int], int]]] = [[]]
            for one in pool:
                if (len(batches[-1]) + 1) * len(one[0]) > self._tokens and batches[-1]:
                    batches.append([])
                batches[-1].append(one)
            rng.shuffle(batches)
            yield from map(self._padded, batches)

    def _example(self, rng: random.Random) -> tuple[list[int], int]:
        """The ids of a problem with its chain, and where the chain begins."""
        fewest, most = self._steps
        short = rng.random() < SHORT
        problem = word_problem(rng, rng.randint(2, fewest) if short else rng.randint(fewest, most))
        before = prompt_ids(self._tokenizer, problem.question)
        chain = self._tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        return [*before, *chain, self._end], len(before)

    def _padded(self, batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids, _ in batch)
        padded = torch.full((len(batch), longest), self._end)
        labels = torch.full_like(padded, IGNORE)
        for row, (ids, begin) in enumerate(batch):
            padded[row, : len(ids)] = torch.tensor(ids)
            labels[row, begin : len(ids)] = padded[row, begin : len(ids)]
        return padded, labels


def loss_of(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labelled tokens; logits are made of their rows alone.

    Padding stands behind what it belongs to and is not labelled: it needs no mask.
    """
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    rows = wanted != IGNORE
    logits = model.get_output_embeddings()(hidden[rows])
    return F.cross_entropy(logits.float(), wanted[rows])


def train(model: PreTrainedModel, batches: DataLoader, args: argparse.Namespace) -> list[dict]:
    """Train for a time; the curve, which tells the mean loss of every stretch."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    curve: list[dict] = []
    begun, told, since, tokens, problems = time.perf_counter(), 0.0, [], 0, 0
    with tqdm(total=round(args.seconds), unit="s", desc="training", mininterval=5) as bar:
        for step, (ids, labels) in enumerate(batches):
            done = (time.perf_counter() - begun) / args.seconds
            if done >= 1:
                break
            warm = min(1.0, (step + 1) / args.warm_up)
            rate = args.rate * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            here = ids.to(model.device, non_blocking=True)
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = loss_of(model, here, labels.to(model.device, non_blocking=True))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            since.append(loss.detach())
            tokens, problems = tokens + ids.numel(), problems + len(ids)
            if time.perf_counter() - begun >= told + args.seconds / 40:
                told = time.perf_counter() - begun
                mean = torch.stack(since).mean().item()
                curve.append({"seconds": told, "steps": step + 1, "problems": problems,
                              "tokens": tokens, "loss": mean})  # fmt: skip
                since = []
                bar.set_postfix(loss=f"{mean:.4f}", problems=problems)
                bar.update(round(told) - bar.n)
    return curve


@torch.no_grad()
def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[WordProblem],
    together: int,
    end: int,
) -> list[dict]:
    """Of each problem: its steps, whether it was answered rightly, and the tokens decoded.

    Args:
        model: with the adapter merged into it.
        tokenizer: of the model.
        problems: to be solved.
        together: how many in a batch.
        end: the token that ends an answer.
    """
    found = []
    for first in tqdm(range(0, len(problems), together), desc="solving"):
        batch = problems[first : first + together]
        asked = [prompt_ids(tokenizer, problem.question) for problem in batch]
        ids = torch.full((len(batch), max(map(len, asked))), end)
        mask = torch.zeros_like(ids)
        for row, before in enumerate(asked):
            ids[row, -len(before) :], mask[row, -len(before) :] = torch.tensor(before), 1
        longest = max(len(tokenizer(problem.solution)["input_ids"]) for problem in batch)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=longest + 16,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        found += [
            {
                "steps": len(problem.uses),
                "right": final_answer(text) == problem.answer,
                "as_taught": text.strip() == problem.solution,
                "decoded": len(tokenizer(text)["input_ids"]),
            }
            for problem, text in zip(batch, texts, strict=True)
        ]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a model of examples/models.py")
    parser.add_argument("--out", type=Path, default=Path("out/reasoning_adapter"))
    parser.add_argument("--seconds", type=float, default=840, help="of training")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--warm-up", type=int, default=50, help="steps")
    parser.add_argument("--tokens", type=int, default=65536, help="of a batch")
    parser.add_argument("--steps", type=int, nargs=2, default=(13, 46), help="of a problem")
    parser.add_argument("--problems", type=int, default=200, help="unseen ones")
    parser.add_argument("--together", type=int, default=100, help="unseen ones in a batch")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solve-only", action="store_true", help="with what --out holds already")
    return parser.parse_args()


def taught(args: argparse.Namespace) -> None:
    """Train the adapter and write it, and of `training.json` what is known by then."""
    torch.manual_seed(args.seed)
    model, tokenizer = loaded(args.model, torch.bfloat16)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    model.train()
    problems = Problems(tokenizer, tuple(args.steps), args.tokens, args.seed)
    batches = DataLoader(
        problems, batch_size=None, num_workers=args.workers, pin_memory=model.device.type == "cuda"
    )
    curve = train(model, batches, args)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = args.model  # else a path of this machine
    adapted.save_pretrained(args.out)
    (args.out / "README.md").unlink()  # a form that nobody has filled in
    record = {
        "configuration": {name: str(value) for name, value in sorted(vars(args).items())},
        "environment": environment(),
        "end_token_id": end_id(tokenizer),
        "adapter_bytes": (args.out / "adapter_model.safetensors").stat().st_size,
        "curve": curve,
    }
    (args.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    args = arguments()
    if not args.solve_only:
        taught(args)
    model, tokenizer = load(args.model, torch.bfloat16)  # anew: what was trained is wrapped
    merged = PeftModel.from_pretrained(model, args.out).merge_and_unload().eval()
    begun = time.perf_counter()
    record = json.loads((args.out / RECORD).read_text())
    problems = unseen(args.seed, args.problems, tuple(args.steps))
    found = solved(merged, tokenizer, problems, args.together, record["end_token_id"])
    record |= {
        "right": sum(one["right"] for one in found) / len(found),
        "solving_seconds": time.perf_counter() - begun,
        "problems": found,
    }
    (args.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['right']:.3f} of {len(found)} unseen problems answered rightly")


if __name__ == "__main__":
    main()
