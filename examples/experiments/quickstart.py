"""Three papers measured on a small trained model, in about three minutes on two CPU cores.

    python examples/experiments/quickstart.py
    python examples/experiments/quickstart.py --model NAME_OR_PATH --documents a.txt b.txt \
        --question "..."

The first form writes `quickstart.json` and `quickstart.png` into --out. The second links your own
files in front of your own question on any HuggingFace model.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from environment import environment
from evaluate import (
    LINK_ARMS,
    REFERENCE_MODEL,
    Row,
    first_token_seconds,
    linking,
    load,
    retention,
    scheduling,
)

from picache import PIC


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns` maps a heading to a format string over the row."""
    cells = [list(columns), *([text.format(**row) for text in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = []
    for line in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


LINKING = {
    "linking": "{arm}",
    "accuracy": "{accuracy:.3f}",
    "95 % interval": "{interval[0]:.3f}-{interval[1]:.3f}",
    "KL to full": "{kl_to_full:.1e}",
    "recomputed": "{tokens_recomputed:.0f} of {prompt_tokens:.0f}",
    "first token": "{first_token_ms:.1f} ms",
    "long prompt": "{long_tokens_recomputed} of {long_prompt_tokens}",
    "its first token": "{long_first_token_ms:.1f} ms",
}
RETENTION = {
    "retention": "{arm}",
    "budget": "{budget_text}",
    "accuracy": "{accuracy:.3f}",
    "95 % interval": "{interval[0]:.3f}-{interval[1]:.3f}",
    "decoded": "{decoded_tokens:.0f}",
    "peak KV": "{peak_kv_kib:.0f} KiB",
    "step": "{milliseconds_a_token:.1f} ms",
}
SCHEDULING = {
    "scheduling": "{mix}: {arm}",
    "mean": "{mean_seconds:.0f} s",
    "P95": "{p95_seconds:.0f} s",
    "mean / FCFS": "{mean_to_fcfs:.2f}",
    "P95 / FCFS": "{p95_to_fcfs:.2f}",
}


def prepare(results: dict) -> dict[str, list[Row]]:
    """The three lists of rows, with milliseconds and KiB for reading."""
    for row in results["linking"]:
        row["first_token_ms"] = 1e3 * row["first_token_seconds"]
        row["long_first_token_ms"] = 1e3 * row["long_first_token_seconds"]
    for row in results["retention"]:
        row["peak_kv_kib"] = row["peak_kv_bytes"] / 1024
        row["budget_text"] = str(row["budget"] or "all")
    return results


def show(results: dict[str, list[Row]]) -> None:
    results = prepare(results)
    link, kept, jobs = (results[name] for name in ("linking", "retention", "scheduling"))
    print(
        f"\nLookup in 8 documents, cut into chunks of {link[0]['chunk_tokens']} tokens, "
        f"{link[0]['problems']} problems; long prompt: many documents"
    )
    print(table(link, LINKING))
    print(
        f"\nReasoning, {kept[0]['problems']} problems of {kept[0]['prompt_tokens']:.0f} "
        f"prompt tokens, batch {kept[0]['batch_size']}; KV of one row"
    )
    print(table(kept, RETENTION))
    print(f"\nCompletion time, load {jobs[0]['load']}, {jobs[0]['jobs']} jobs x {jobs[0]['seeds']}")
    print(table(jobs, SCHEDULING))


def figure(results: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["accuracy", "retention", "scheduling"], ["divergence", "retention", "scheduling"]],
        figsize=(15, 5.2),
        layout="constrained",
    )
    above, below = axes["accuracy"], axes["divergence"]
    middle, right = axes["retention"], axes["scheduling"]
    for marker, row in zip("*os^vD<Px", results["linking"], strict=False):
        low, high = row["interval"]
        x, y = row["tokens_recomputed"] / row["prompt_tokens"], row["accuracy"]
        spread = [[max(0, y - low)], [max(0, high - y)]]
        above.errorbar(x, y, spread, fmt=marker, capsize=3, label=row["arm"])
        if row["kl_to_full"] > 0:
            below.plot(x, row["kl_to_full"], marker)
        else:
            below.plot([], [], marker)  # keeps the colours in step
    above.set(
        ylabel="answer accuracy",
        title=f"Linking: lookup in chunks of {results['linking'][0]['chunk_tokens']} tokens",
        xlim=(0, 1.05),
        ylim=(-0.03, 1.06),
    )
    above.legend(fontsize=7, ncols=2)
    below.set(
        xlabel="share of the prompt recomputed",
        ylabel="KL to full prefill",
        yscale="log",
        xlim=(0, 1.05),
    )
    names = dict.fromkeys(row["arm"] for row in results["retention"])
    for marker, name in zip("*os^v", names, strict=True):
        rows = [row for row in results["retention"] if row["arm"] == name]
        x = [row["peak_kv_bytes"] / 1024 for row in rows]
        y = [row["accuracy"] for row in rows]
        low = [max(0, a - row["interval"][0]) for a, row in zip(y, rows, strict=True)]
        high = [max(0, row["interval"][1] - a) for a, row in zip(y, rows, strict=True)]
        middle.errorbar(x, y, [low, high], fmt=marker, capsize=3, label=name)
    middle.legend(fontsize=8)
    budgets = sorted({row["budget"] for row in results["retention"]} - {0})
    middle.set(
        xlabel="peak KV, KiB a sequence",
        ylabel="answer accuracy",
        title=f"Retention: reasoning, budgets {', '.join(map(str, budgets))} tokens",
        ylim=(-0.03, 1.06),
    )
    middle.margins(x=0.2)
    mixes = list(dict.fromkeys(row["mix"] for row in results["scheduling"]))
    for i, mix in enumerate(mixes):
        rows = [row for row in results["scheduling"] if row["mix"] == mix]
        places = [place + 0.4 * i for place in range(len(rows))]
        right.bar(places, [row["mean_to_fcfs"] for row in rows], 0.38, label=f"{mix}: mean")
        right.plot(places, [row["p95_to_fcfs"] for row in rows], "k_", markersize=12)
    right.plot([], [], "k_", label="P95")
    right.set_xticks([place + 0.2 for place in range(len(rows))], [row["arm"] for row in rows])
    right.tick_params(axis="x", labelrotation=20)
    right.set(ylabel="completion time / FCFS", title=f"Scheduling at load {rows[0]['load']}")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def own_documents(name: str, paths: list[Path], question: str, new_tokens: int, out: Path) -> None:
    """Link the user's files on any model: what each arm answers, costs, and how far it strays.

    The texts are joined as they are, with an empty line after each file; no chat template.
    """
    model, tokenizer = load(name)
    pic = PIC(model, tokenizer)
    documents = [path.read_text().strip() + "\n\n" for path in paths]
    begun = time.perf_counter()
    chunks = [pic.compile(document) for document in documents]
    print(f"compiled {len(chunks)} documents in {time.perf_counter() - begun:.2f} s: {pic.store}\n")
    ids = pic.link(chunks, question, LINK_ARMS[0][1])["input_ids"]
    with torch.no_grad():
        full = model(ids, logits_to_keep=1).logits[:, -1].double().log_softmax(-1)
    plain = statistics.median(first_token_seconds(model, ids) for _ in range(3))
    print(f"full prefill: {ids.shape[1]} tokens, first token after {1e3 * plain:.1f} ms\n")
    rows = []
    for arm, method, bos in LINK_ARMS:
        if bos:
            continue  # the tokenizer decides whether a document begins with a BOS
        prompt = pic.link(chunks, question, method)
        linked = prompt.logits.double().log_softmax(-1)
        divergence = float((full.exp() * (full - linked)).sum())
        tokens = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=False)
        answer = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        row = {"arm": arm, "kl_to_full": divergence, "answer": answer, **vars(prompt.report)}
        rows.append(row | {"tokens_recomputed": prompt.report.tokens_recomputed})
        print(f"{arm}: KL to full {divergence:.2e}\n{prompt.report}\nanswer: {answer!r}\n")

    configuration = {"model": name, "documents": [str(p) for p in paths], "question": question}
    record = {
        "configuration": configuration,
        "environment": environment(),
        "full_prefill_seconds": plain,
        "linking": rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "own_documents.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out / 'own_documents.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for JSON and PNG")
    parser.add_argument("--model", default=str(REFERENCE_MODEL), help="name or path of an HF model")
    parser.add_argument("--documents", type=Path, nargs="+", help="text files to link, in order")
    parser.add_argument("--question", help="what to ask after the documents")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--link-problems", type=int, default=100)
    parser.add_argument("--chunk-tokens", type=int, default=24, help="tokens of a chunk")
    parser.add_argument("--reasoning-problems", type=int, default=24)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[384, 512], help="tokens kept by a KV head"
    )
    parser.add_argument("--jobs", type=int, default=3000)
    parser.add_argument("--load", type=float, default=0.9)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (args.documents is None) != (args.question is None):
        parser.error("--documents and --question go together")
    if args.documents:
        for path in args.documents:
            if not path.is_file() or not path.read_text().strip():
                parser.error(f"{path} is no file with text in it")
        own_documents(args.model, args.documents, args.question, args.new_tokens, args.out)
        return
    if args.model != str(REFERENCE_MODEL):
        parser.error(
            "another --model needs --documents and --question: the tasks of the tables "
            "are those the reference model was trained on"
        )
    begun = time.perf_counter()
    model, tokenizer = load(args.model)
    results = {
        "linking": linking(model, tokenizer, args.link_problems, args.chunk_tokens),
        "retention": retention(model, tokenizer, args.reasoning_problems, args.budgets),
        "scheduling": scheduling(args.jobs, range(4), args.load),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "configuration": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        | {"model": "examples/reference_model"},
        "environment": environment(),
        "seconds": time.perf_counter() - begun,
        **results,
    }
    (args.out / "quickstart.json").write_text(json.dumps(record, indent=1) + "\n")
    show(results)
    figure(results, args.out / "quickstart.png")
    print(f"\n{record['seconds']:.0f} s; wrote {args.out / 'quickstart.json'} and quickstart.png")


if __name__ == "__main__":
    main()
