"""Train the reference model from scratch, on one GPU or on a few CPU cores.

    python examples/experiments/train_reference_model.py --out examples/reference_model

Writes weights (bf16 safetensors), tokenizer, `training.json` (command, seed, steps, wall time,
hardware, curve, measured accuracies) and the model card. The accuracies are measured on the saved
bf16 weights, with full attention, on problems from a seed that training never draws.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from environment import hardware
from reference_tasks import (
    BOS,
    EOS,
    PAD,
    TOWNS,
    UNK,
    VOCABULARY,
    final_answer,
    lookup_problem,
    reasoning_problem,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
IGNORE = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: one word, one token; adds no special token by itself."""
    backend = Tokenizer(models.WordLevel(dict(TOKEN), unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=(len(VOCABULARY) + 63) // 64 * 64,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            attention_bias=True,
            initializer_range=args.init_std,
            max_position_embeddings=4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
            pad_token_id=TOKEN[PAD],
            bos_token_id=TOKEN[BOS],
            eos_token_id=TOKEN[EOS],
        )
    )
    plant_copying(model)
    return model


@torch.no_grad()
def plant_copying(model: LlamaForCausalLM, strength: float = 12.0, gain: float = 3.0) -> None:
    """Let training begin with heads that look back, and heads that match what those bring.

    Copying from context takes both (an induction circuit); learned from nothing they wait for each
    other for tens of millions of tokens. So in layer 0 head h begins by looking h + 1 tokens back
    (h < 5): a key bias u and a query bias that is u turned back by the offset make the score
    largest at that distance. Its value is a projection A of the token, put into a part B_h of the
    residual stream. In layer 1 four heads begin by comparing such projections of what stands at and
    before a token with those at and before the keys: the token itself with what stood before a key
    (where was this variable given its value?), the last two tokens with the two before a key (what
    came after these two?), the same with the latest town in place of the first (head 6 of layer 0
    finds it by a direction that the embeddings of all towns begin with), and the same with the token
    four back in place of the first. Everything is trained from there like the rest.
    """
    config, (first, second) = model.config, (layer.self_attn for layer in model.model.layers[:2])
    head_dim, hidden, half, fastest = config.head_dim, config.hidden_size, config.head_dim // 2, 6
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    first.k_proj.bias.view(-1, 2, half)[:, 0, :fastest] = strength
    queries = first.q_proj.bias.view(-1, 2, half)
    for head in range(5):
        queries[head, 0, :fastest] = strength * torch.cos((head + 1) * turns[:fastest])
        queries[head, 1, :fastest] = -strength * torch.sin((head + 1) * turns[:fastest])

    # Head 6: towns score high, nearer ones higher.
    towns = torch.tensor([TOKEN[town] for town in TOWNS])
    direction = torch.nn.functional.normalize(torch.randn(hidden), dim=0)
    model.model.embed_tokens.weight[towns] += direction
    by_kind, by_distance, last = 10, 4, first.k_proj.bias.view(-1, head_dim)[3]
    last.zero_()
    first.k_proj.weight[3 * head_dim + by_kind] = direction
    last[by_distance], first.q_proj.bias.view(-1, head_dim)[6, by_distance] = 5.0, 5.0
    first.q_proj.bias.view(-1, head_dim)[6, by_kind] = 4.0

    # What the blocks write begins small beside the embedding, or it drowns what is planted.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.02
        layer.mlp.down_proj.weight *= 0.02
    # Matching must not depend on the distance: it lives in the slowly turning dimensions.
    slow = torch.tensor([i for i in range(head_dim) if i % half >= 7])
    # What is read and what is written share no direction, or the written would drown the read.
    read, *written = torch.nn.init.orthogonal_(torch.empty(hidden, 5 * len(slow))).chunk(5, dim=1)
    bring, into = read.T, dict(zip((0, 1, 3, 6), written, strict=True))
    for kv_head in range(config.num_key_value_heads):
        first.v_proj.weight[kv_head * head_dim : kv_head * head_dim + len(slow)] = bring
    for head, part in into.items():
        first.o_proj.weight[:, head * head_dim : head * head_dim + len(slow)] = 0.3 * part

    def match(head: int, *pairs: tuple[Tensor, Tensor]) -> None:
        kv_head = head // (config.num_attention_heads // config.num_key_value_heads)
        for query, key in pairs:  # each in a basis of its own, or they would match crosswise
            basis = torch.nn.init.orthogonal_(torch.empty(len(slow), len(slow)))
            second.q_proj.weight[head * head_dim + slow] += gain * basis @ query
            second.k_proj.weight[kv_head * head_dim + slow] += gain * basis @ key

    itself, before, two_before, four_before, town = bring, *(part.T for part in written)
    match(0, (itself, before))
    match(2, (before, two_before), (itself, before))
    match(4, (before, town), (itself, before))
    match(6, (four_before, four_before), (itself, before))
    # What is found is copied: a share of the embedding per head, written back where it was.
    second.v_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty_like(second.v_proj.weight)))
    for head in (0, 2, 4, 6):
        kept = slice(head // 2 * head_dim, (head // 2 + 1) * head_dim)
        out = slice(head * head_dim, (head + 1) * head_dim)
        second.o_proj.weight[:, out] = 0.2 * second.v_proj.weight[kept].T


Row = tuple[list[str], list[int]]  # words, and the places of the words the loss is taken on
Level = list[tuple[tuple[int, int], ...]]  # kinds of problems, each a least and a most per size

# Documents and facts. First facts of one document and single facts of several, so that both keys
# of a lookup (the relation, the town) are learned on their own before they are needed together.
LOOKUP_LEVELS: list[Level] = [
    [((1, 1), (2, 3)), ((2, 3), (1, 1))],
    [((1, 1), (2, 6)), ((2, 6), (1, 1)), ((2, 3), (2, 3))],
    [((1, 1), (2, 7)), ((2, 8), (1, 1)), ((2, 3), (2, 3)), ((2, 4), (2, 4))],
    [((2, 5), (2, 5))],
    [((2, 8), (2, 6))],
    [((2, 9), (2, 7)), ((6, 9), (5, 7))],
]
REASONING_LEVELS: list[Level] = [
    [((3, steps),), ((steps, steps),)] for steps in (4, 6, 9, 13, 18, 25, 34, 44, 48)
]


@dataclass
class Curriculum:
    """Problem sizes grow with what the model can do: a level up at a mean accuracy over `bar`.

    Mastered, at the last level with an accuracy over `goal`, a task is trained on every `rest`-th
    step only.
    """

    row: Callable[..., Row]
    levels: list[Level]
    bar: float
    goal: float
    rest: int
    level: int = 0
    accuracy: float = 0.0

    def batch(self, rng: random.Random, tokens: int) -> tuple[Tensor, Tensor]:
        """Ids and labels ``[rows, length]``; labels are IGNORE where no loss is taken."""
        size = [rng.randint(*span) for span in rng.choice(self.levels[self.level])]
        rows = [self.row(rng, *size)]
        rows += [self.row(rng, *size) for _ in range(tokens // len(rows[0][0]) - 1)]
        shape = (len(rows), max(len(words) for words, _ in rows))
        ids, labels = np.full(shape, TOKEN[PAD]), np.full(shape, IGNORE)
        for index, (words, places) in enumerate(rows):
            ids[index, : len(words)] = [TOKEN[word] for word in words]
            labels[index, places] = ids[index, places]
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def observe(self, accuracy: float) -> None:
        self.accuracy += 0.05 * (accuracy - self.accuracy)
        if self.accuracy > self.bar and self.level + 1 < len(self.levels):
            self.level, self.accuracy = self.level + 1, 0.0

    @property
    def mastered(self) -> bool:
        return self.level + 1 == len(self.levels) and self.accuracy > self.goal


def lookup_row(rng: random.Random, documents: int, facts: int) -> Row:
    """Questions are drawn with replacement.

    Asked once each, the values left over give a shortcut (answer with one that was not used yet)
    that is easier to learn than the lookup and keeps the model from it.
    """
    problem = lookup_problem(rng, documents, facts)
    words = problem.prompt().split()[:-2]  # without the one question: the drawn ones follow
    places = []
    for question, answer in rng.choices(problem.questions, k=16):
        words += question.split()
        places.append(len(words))
        words += [answer, "."]
    return words, places


def reasoning_row(rng: random.Random, steps: int) -> Row:
    problem = reasoning_problem(rng, steps)
    prompt, solution = problem.prompt.split(), problem.solution.split()
    return prompt + solution, list(range(len(prompt), len(prompt) + len(solution)))


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Schedule:
    """Warm-up, constant, then linear to 2 % over the last share of the steps.

    The descent begins earlier once both tasks are mastered.
    """

    def __init__(self, steps: int, descent: float) -> None:
        self.descent = round(descent * steps)
        self.begins = steps - self.descent

    def factor(self, step: int, mastered: bool) -> float:
        if mastered:
            self.begins = min(self.begins, step)
        left = 1 - (step - self.begins) / self.descent
        return min(1.0, (step + 1) / 50, max(0.02, left))

    def over(self, step: int) -> bool:
        return step >= self.begins + self.descent


def train(model: LlamaForCausalLM, args: argparse.Namespace, device: str) -> list[dict]:
    rng = random.Random(args.seed)
    tasks = {
        "lookup": Curriculum(lookup_row, LOOKUP_LEVELS, bar=0.92, goal=0.985, rest=4),
        "reasoning": Curriculum(reasoning_row, REASONING_LEVELS, bar=0.96, goal=0.996, rest=1),
    }
    if args.resume:
        for task in tasks.values():
            task.level = len(task.levels) - 1
    optimizing = optimizers(model, args)
    plan = Schedule(args.steps, args.descent)
    curve: list[dict] = []
    begun = time.perf_counter()
    for step in (progress := tqdm(range(args.steps), mininterval=20, desc="train")):
        mastered = all(task.mastered for task in tasks.values())
        factor = plan.factor(step, mastered)
        if plan.over(step) or time.perf_counter() - begun > 60 * args.minutes:
            break
        for group in (g for optimizer in optimizing for g in optimizer.param_groups):
            group["lr"] = args.lr * factor
        point: dict = {"step": step, "seconds": round(time.perf_counter() - begun, 1)}
        for name, task in tasks.items():
            if task.mastered and step % task.rest:
                continue
            ids, labels = (t.to(device) for t in task.batch(rng, args.tokens))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            asked = labels[:, 1:] != IGNORE
            logits = model.lm_head(hidden[:, :-1][asked])
            targets = labels[:, 1:][asked]
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            right = (logits.argmax(-1) == targets).float().mean().item()
            task.observe(right)
            point |= {
                f"{name}_loss": round(loss.item(), 5),
                f"{name}_accuracy": round(task.accuracy, 5),
                f"{name}_level": task.level,
            }
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizing:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % args.log_every == 0:
            curve.append(point)
            progress.write(" ".join(f"{key} {value}" for key, value in point.items()))
        if args.save_every and step % args.save_every == args.save_every - 1:
            model.save_pretrained(args.out / "unfinished")
    curve.append(point)
    return curve


@torch.no_grad()
def answers(model: LlamaForCausalLM, tokenizer, prompts: list[str], tokens: int) -> list[str]:
    """Greedy texts of at most `tokens` tokens, full attention, 50 prompts at a time."""
    texts: list[str] = []
    for first in range(0, len(prompts), 50):
        inputs = tokenizer(
            prompts[first : first + 50],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :])
    return texts


def evaluate(model: LlamaForCausalLM, tokenizer, problems: int) -> dict:
    """Exact match with full attention, greedy, on unseen problems."""
    rng = random.Random(10**9)
    lookups = [lookup_problem(rng, documents=8, facts=6) for _ in range(problems)]
    texts = answers(model, tokenizer, [p.prompt() for p in lookups], 1)
    right = [text == p.questions[0][1] for text, p in zip(texts, lookups, strict=True)]
    chains = [reasoning_problem(rng, steps=40) for _ in range(problems)]
    lengths = [len(c.solution.split()) for c in chains]
    texts = answers(model, tokenizer, [c.prompt for c in chains], max(lengths) + 8)
    final = [final_answer(text) == c.answer for text, c in zip(texts, chains, strict=True)]
    whole = [text.startswith(c.solution) for text, c in zip(texts, chains, strict=True)]
    return {
        "problems": problems,
        "lookup_exact_match": float(np.mean(right)),
        "reasoning_exact_match": float(np.mean(final)),
        "reasoning_whole_chain": float(np.mean(whole)),
        "reasoning_tokens": [min(lengths), max(lengths)],
    }


CARD = """# The reference model

A Llama-architecture model of {parameters:.2f} million parameters ({megabytes:.1f} MB in bf16), trained from
scratch by this project on two generated tasks in templated English (`examples/experiments/reference_tasks.py`).
It exists so that the quickstart and the accuracy tests measure a trained model without a download.
It knows nothing else.

| what | measured |
|---|---|
| lookup: 8 documents of 6 facts, one question at a time, exact match on {problems} unseen problems | {lookup_exact_match:.3f} |
| reasoning: greedy over {reasoning_tokens[0]} to {reasoning_tokens[1]} tokens to the right final answer, {problems} unseen problems | {reasoning_exact_match:.3f} |
| the same, every line of the chain right | {reasoning_whole_chain:.3f} |

Full attention, greedy, on the saved bf16 weights. {steps} steps, seed {seed}, {seconds:.0f} s on one {hardware}, {threads} CPU
threads (torch {torch}, transformers {transformers}), with

```
{command}
```

Shape: {layers} layers, hidden {hidden}, {heads} query heads on {kv_heads} KV heads, vocabulary {vocabulary}, RoPE theta 1,000,000,
4,096 positions, biases in attention. Training begins with planted copying heads (`plant_copying`).
The tokenizer is word-level (one word, one token) and adds no special token: a prompt begins with an
explicit `<bos>`. Training sequences hold at most 900 tokens. The learning curve stands in
`training.json`.
{history}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop training after this long")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per task and step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--init-std", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=200, help="unseen problems per task")
    parser.add_argument("--resume", type=Path, help="go on from these weights, at the last levels")
    parser.add_argument("--descent", type=float, default=0.5, help="share of steps to slow down in")
    parser.add_argument("--save-every", type=int, default=0, help="steps between copies; 0: none")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()

    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = build_tokenizer(), build_model(args)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    model = model.to(device).train()
    begun = time.perf_counter()
    curve = train(model, args, device)
    seconds = time.perf_counter() - begun
    # Saved and measured in bf16: rounding the weights is part of what is shipped.
    model = model.eval().to(torch.bfloat16)
    model.generation_config.pad_token_id = TOKEN[PAD]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    measured = evaluate(model.float(), tokenizer, args.problems)
    config = model.config
    record = {
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "steps": curve[-1]["step"] + 1,
        "seconds": seconds,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "megabytes": (args.out / "model.safetensors").stat().st_size / 1e6,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocabulary": config.vocab_size,
        **measured,
        "history": "",
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1))
    (args.out / "README.md").write_text(CARD.format(**record))
    print(json.dumps({key: value for key, value in record.items() if key != "curve"}))


if __name__ == "__main__":
    main()
