"""How a cache comes to see the whole prompt: `generate` hands a model only what is new in it."""

from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

_METHOD = "prepare_inputs_for_generation"
Look = Callable[[Tensor, dict[str, Any]], None]


class PromptCheck:
    """In the place of a model's `prepare_inputs_for_generation`: looks at its arguments first."""

    def __init__(self, model: GenerationMixin, look: Look) -> None:
        self.own = vars(model).get(_METHOD)  # what the object had beside its class
        self.__wrapped__: Any = getattr(model, _METHOD)  # for those who ask for its signature
        self.look = look

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The look, then the inputs that the model prepares."""
        self.look(input_ids, kwargs)
        return self.__wrapped__(input_ids, *args, **kwargs)


def watch_prompts(model: PreTrainedModel, look: Look) -> Callable[[], None]:
    """Have `look` called in each step of `generate`; returns what undoes it.

    It is given the whole `input_ids` so far, where a forward has the new ones only, and the other
    arguments of the step.
    """
    if not isinstance(model, GenerationMixin):
        return lambda: None
    setattr(model, _METHOD, PromptCheck(model, look))
    weak = ref(model)  # what undoes it is kept for as long as the model is there

    def undo() -> None:
        watched = weak()
        check = None if watched is None else vars(watched).get(_METHOD)
        if isinstance(check, PromptCheck):
            delattr(watched, _METHOD)
            if check.own is not None:
                setattr(watched, _METHOD, check.own)

    return undo
