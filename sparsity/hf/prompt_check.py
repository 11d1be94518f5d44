"""How the whole prompt of `generate` reaches a cache: a forward is given only what is new in it."""

from collections.abc import Callable
from typing import Any
from weakref import ref

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
        self.own = vars(model).get(_METHOD)  # what the object had beside its class
        self.__wrapped__: Any = getattr(model, _METHOD)  # for those who ask for its signature
        self.check = check

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments, then prepare the inputs as the model does."""
        self.check(input_ids, kwargs)
        return self.__wrapped__(input_ids, *args, **kwargs)


def watch_prompts(model: PreTrainedModel, check: Check) -> Callable[[], None]:
    """Call `check` in each step of `generate`.

    Args:
        model: without `generate`, nothing is done.
        check: called with the whole `input_ids` so far, where a forward has the new ones only, and
            the other arguments of the step.

    Returns:
        A function that undoes it.
    """
    if not isinstance(model, GenerationMixin):
        return lambda: None
    setattr(model, _METHOD, PromptCheck(model, check))
    weak = ref(model)  # what undoes it is kept for as long as the model is there

    def undo() -> None:
        watched = weak()
        found = None if watched is None else vars(watched).get(_METHOD)
        if isinstance(found, PromptCheck):
            delattr(watched, _METHOD)
            if found.own is not None:
                setattr(watched, _METHOD, found.own)

    return undo
