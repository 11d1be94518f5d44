"""A predictor of one's own: what a small text model makes of a prompt says how long it will take.

    predictor = EmbeddingPredictor.fit(Embedder("smollm2"), prompts, seconds)
    simulate(..., predictor=predictor)  # or predictor= of an adapter: it has predict(call)

After the idea of LTR (arXiv 2408.15792) and ELIS (arXiv 2505.09142), which train a small model for
it; here the model is left as it is, and a ridge regression reads the mean of its hidden states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from models import load

from demand import Distribution, PendingCall
from demand.refine import LogFit, LogRidge

RIDGES = (100.0, 1000.0, 10_000.0)


class Embedder:
    """The mean of a model's hidden states over the tokens of a text, half-way up its layers."""

    def __init__(self, name: str = "smollm2", most_tokens: int = 512) -> None:
        model, self.tokenizer = load(name)
        self.decoder = model.get_decoder()
        self.layer = self.decoder.config.num_hidden_layers // 2
        self.decoder.layers = self.decoder.layers[: self.layer + 1]  # the rest is not needed
        self.most_tokens = most_tokens

    def __call__(self, text: str) -> np.ndarray:
        """`[d]` of one text."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids[:, -self.most_tokens :]
        with torch.inference_mode():
            out = self.decoder(ids.to(self.decoder.device), output_hidden_states=True)
        return out.hidden_states[self.layer][0].float().mean(dim=0).cpu().numpy().astype(float)


@dataclass(frozen=True)
class EmbeddingPredictor:
    """Says from the embedding of a prompt what is left.

    Attributes:
        embed: of a text.
        fitted: from an embedding to seconds.
        ridge: that predicted best what was left out.
    """

    embed: Callable[[str], np.ndarray]
    fitted: LogFit
    ridge: float

    @classmethod
    def fit(
        cls, embed: Callable[[str], np.ndarray], prompts: Sequence[str], seconds: Sequence[float]
    ) -> "EmbeddingPredictor":
        """Learn from prompts and what each took; choose the ridge by what is left out."""
        embedded = np.array([embed(prompt) for prompt in prompts])
        fits = {ridge: LogRidge(ridge).fit(embedded, seconds) for ridge in RIDGES}
        ridge = min(fits, key=lambda ridge: float(fits[ridge].residuals.std()))
        return cls(embed, fits[ridge], ridge)

    def predict(self, call: PendingCall) -> Distribution:
        """What is left at `call`, whose prompt is text."""
        assert isinstance(call.prompt, str)
        return self.fitted(self.embed(call.prompt))
