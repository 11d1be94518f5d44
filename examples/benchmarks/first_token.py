"""What a full prefill takes to its first new token."""

import time

import torch
from transformers import PreTrainedModel


def first_token_seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Seconds of a plain full prefill up to the logits of the first new token."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
