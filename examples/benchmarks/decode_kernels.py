"""Attention of one new token a row over the keys and values held, the kernel alone.

Each kernel runs as one CUDA graph over so many layers' keys and values that none is still in the
cache of the GPU when its turn comes again. What is not installed or refuses is listed with why.
"""

import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16  # of Llama 3.1 8B
COPIED, REPLAYS = 2**31, 20  # bytes; graphs timed


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy from device memory to device memory."""
    size = COPIED if device.type == "cuda" else COPIED >> 7
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device)
    return 2 * size / seconds


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, of many that follow each other."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPLAYS


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph; on a CPU the call itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


Layer = tuple[Tensor, Tensor]  # keys and values, [batch, kv_heads, tokens, head_dim]


def of_torch(backend: SDPBackend) -> Callable:
    """torch's own attention; "flash" is flash-attn 2's kernel, split along the keys."""

    def build(query: Tensor, layers: list[Layer]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with sdpa_kernel(backend):
                return [sdpa(query, *layer, enable_gqa=True)[:, :, 0] for layer in layers]

        return run

    return build


def of_pages(query: Tensor, layers: list[Layer]) -> Callable[[], list[Tensor]]:
    """Ours, over pages of 16 tokens, all of them full."""
    from sparsity.kernels.decode_attention import decode_attention

    batch, _, tokens, _ = layers[0][0].shape
    start = torch.arange(0, tokens, PAGE, dtype=torch.int32, device=query.device)
    start = start.expand(batch, KV_HEADS, -1).contiguous()
    now = torch.full((batch,), tokens - 1, device=query.device)
    asked = query[:, :, 0].contiguous()

    def run() -> list[Tensor]:
        scaling = HEAD_DIM**-0.5
        return [decode_attention(asked, *kv, start, now, PAGE, scaling)[0] for kv in layers]

    return run


def of_flashinfer(query: Tensor, layers: list[Layer]) -> Callable[[], list[Tensor]]:
    """FlashInfer's batch decode over pages of 16 tokens; built by nvcc in its first call."""
    import flashinfer

    batch, tokens, device = query.shape[0], layers[0][0].shape[2], query.device
    pages = tokens // PAGE
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    first = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    listed = torch.arange(batch * pages, dtype=torch.int32, device=device)
    last = torch.full((batch,), PAGE, dtype=torch.int32, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "HND",
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.empty_like(first),
        paged_kv_indices_buffer=torch.empty_like(listed),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    kind = dict(q_data_type=query.dtype, kv_data_type=query.dtype)
    wrapper.plan(first, listed, last, HEADS, KV_HEADS, HEAD_DIM, PAGE, **kind)

    def paged(kept: Tensor) -> Tensor:  # [batch * pages, kv_heads, page, head_dim]
        return kept.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous()

    paged_layers = [(paged(key), paged(value)) for key, value in layers]
    asked = query[:, :, 0].contiguous()
    return lambda: [wrapper.run(asked, layer) for layer in paged_layers]


def of_flash_attn(query: Tensor, layers: list[Layer]) -> Callable[[], list[Tensor]]:
    """flash-attn 2's decode attention over a cache."""
    from flash_attn import flash_attn_with_kvcache

    asked, turned = token_first(query, layers)
    return lambda: [flash_attn_with_kvcache(asked, *layer)[:, 0] for layer in turned]


def of_flash_attn_4(query: Tensor, layers: list[Layer]) -> Callable[[], list[Tensor]]:
    """flash-attn 4, which does not split along the keys on Hopper."""
    from flash_attn.cute import flash_attn_func

    asked, turned = token_first(query, layers)

    def run() -> list[Tensor]:
        outs = [flash_attn_func(asked, *layer, causal=False) for layer in turned]
        return [(out[0] if isinstance(out, tuple) else out)[:, 0] for out in outs]

    return run


def token_first(query: Tensor, layers: list[Layer]) -> tuple[Tensor, list[Layer]]:
    """The same as `[batch, tokens, heads, head_dim]`, as flash-attn lays it out in memory."""
    turned = [tuple(kept.transpose(1, 2).contiguous() for kept in layer) for layer in layers]
    return query.transpose(1, 2).contiguous(), turned


KERNELS: dict[str, tuple[str, Callable]] = {  # the package that each needs
    "torch, flash": ("torch", of_torch(SDPBackend.FLASH_ATTENTION)),
    "torch, cuDNN": ("torch", of_torch(SDPBackend.CUDNN_ATTENTION)),
    "ours, over pages": ("sparsity.kernels", of_pages),
    "FlashInfer": ("flashinfer", of_flashinfer),
    "flash-attn 2": ("flash_attn_2_cuda", of_flash_attn),
    "flash-attn 4": ("flash_attn.cute", of_flash_attn_4),
}
ON_CPU: dict[str, tuple[str, Callable]] = {
    "torch, math": ("torch", of_torch(SDPBackend.MATH)),
    "ours, over pages": ("sparsity.kernels", of_pages),
}


def difference(query: Tensor, layer: Layer, found: Tensor) -> float:
    """The largest absolute difference from float32, so that no wrong layout is timed."""
    with sdpa_kernel(SDPBackend.MATH):
        wanted = sdpa(query.float(), layer[0].float(), layer[1].float(), enable_gqa=True)
    return (found.reshape(wanted[:, :, 0].shape).float() - wanted[:, :, 0]).abs().max().item()


def installed(package: str) -> bool:
    """Whether a package can be imported, its parents first."""
    parts = package.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return all(importlib.util.find_spec(name) is not None for name in names)


@torch.no_grad()
def kernel_rows(device: torch.device, tiny: bool) -> list[dict]:
    """A row for each kernel, batch and number of tokens held: microseconds a layer, bytes read."""
    kernels = KERNELS if device.type == "cuda" else ON_CPU
    sizes = [(2, 64)] if tiny else [(32, 1024), (32, 2048), (1, 2048), (1, 32768)]
    dtype = torch.float32 if tiny else torch.bfloat16
    rows = []
    for batch, tokens in sizes:
        given = dict(dtype=dtype, device=device)
        query = torch.randn(batch, HEADS, 1, HEAD_DIM, **given)
        size = (batch, KV_HEADS, tokens, HEAD_DIM)
        read = 2 * dtype.itemsize * batch * KV_HEADS * tokens * HEAD_DIM
        count = 2 if tiny else max(4, -(-(1 << 29) // read))
        layers = [(torch.randn(size, **given), torch.randn(size, **given)) for _ in range(count)]
        for kernel, (package, build) in kernels.items():
            row = {
                "name": f"kernel {kernel}, batch {batch}, tokens {tokens}",
                "kernel": kernel,
                "batch": batch,
                "tokens": tokens,
                "bytes": read,
            }
            rows.append(row)
            if not installed(package):
                row["missing"] = f"{package} is not installed"
                continue
            begun = time.perf_counter()
            try:
                run = build(query, layers)
                row["difference"] = difference(query, layers[-1], run()[-1])
                run = captured(run, device)
                row["build_seconds"] = time.perf_counter() - begun
                row["microseconds"] = 1e6 * seconds_of(run, device) / count
            except Exception as error:
                row["missing"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            print(row["name"], row.get("microseconds", row.get("missing")), flush=True)
    return rows
