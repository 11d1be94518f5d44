"""How what `generate` is about to do reaches a cache: two methods of a model are watched."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

from transformers import GenerationMixin, PreTrainedModel

# Called with the model's own method and the arguments it was called with, in place of the method.
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Watched:
    """Stands for a method of a model.

    Attributes:
        name: of the method.
        own: what the model had under that name beside its class's method; None for nothing.
        around: called in its place.
    """

    def __init__(self, model: GenerationMixin, name: str, around: Around) -> None:
        self.name = name
        self.own = vars(model).get(name)
        self.__wrapped__: Any = getattr(model, name)  # for those who ask for its signature
        self.around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `around` in place of the method."""
        return self.around(self.__wrapped__, args, kwargs)


# Decoders, and the models around them that are watched; apart from what a model holds, so that a
# model that is attached can be copied and pickled.
_WATCHED: WeakKeyDictionary[PreTrainedModel, ref[PreTrainedModel]] = WeakKeyDictionary()


def watch(decoder: PreTrainedModel, model: PreTrainedModel, around: Mapping[str, Around]) -> None:
    """Call functions in place of methods of `model`, until `unwatch(decoder)`.

    Args:
        decoder: of the model.
        model: that generates; without `generate`, nothing is done.
        around: the functions, by the names of the methods.
    """
    if isinstance(model, GenerationMixin):
        for name, function in around.items():
            setattr(model, name, Watched(model, name, function))
        _WATCHED[decoder] = ref(model)


def unwatch(decoder: PreTrainedModel) -> None:
    """Undo `watch`."""
    model = _WATCHED.pop(decoder, lambda: None)()
    if model is None:
        return
    for name, found in list(vars(model).items()):
        if isinstance(found, Watched):
            delattr(model, name)
            if found.own is not None:
                setattr(model, name, found.own)
