"""How the whole prompt of `generate` reaches a cache: a forward is given only what is new in it."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

_METHOD = "prepare_inputs_for_generation"
Check = Callable[[Tensor, dict[str, Any]], None]


class PromptCheck:
    """Stands for a model's `prepare_inputs_for_generation`, and checks its arguments first.

    Attributes:
        own: what the model had under that name beside its class's method; None for nothing.
        check: called with `input_ids` and the other arguments.
    """

    def __init__(self, model: GenerationMixin, check: Check) -> None:
        self.own = vars(model).get(_METHOD)
        self.__wrapped__: Any = getattr(model, _METHOD)  # for those who ask for its signature
        self.check = check

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments, then prepare the inputs as the model does."""
        self.check(input_ids, kwargs)
        return self.__wrapped__(input_ids, *args, **kwargs)


# Decoders, and the models around them whose prompts are watched; apart from what a model holds, so
# that a model that is attached can be copied and pickled.
_WATCHED: WeakKeyDictionary[PreTrainedModel, ref[PreTrainedModel]] = WeakKeyDictionary()


def watch_prompts(decoder: PreTrainedModel, model: PreTrainedModel, check: Check) -> None:
    """Call `check` in each step of `generate`, until `unwatch_prompts(decoder)`.

    Args:
        decoder: of the model.
        model: that generates; without `generate`, nothing is done.
        check: called with the whole `input_ids` so far, where a forward has the new ones only, and
            the other arguments of the step.
    """
    if isinstance(model, GenerationMixin):
        setattr(model, _METHOD, PromptCheck(model, check))
        _WATCHED[decoder] = ref(model)


def unwatch_prompts(decoder: PreTrainedModel) -> None:
    """Undo `watch_prompts`."""
    model = _WATCHED.pop(decoder, lambda: None)()
    found = None if model is None else vars(model).get(_METHOD)
    if model is not None and isinstance(found, PromptCheck):
        delattr(model, _METHOD)
        if found.own is not None:
            setattr(model, _METHOD, found.own)
