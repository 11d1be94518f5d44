"""What a captured pass is traced from: it is to be captured anew where that has changed."""

from typing import Any

from picache.hf.model import HFModel

_LOOK_ON = ("transformers", "sparsity")  # their hooks serve caches of their own kind alone


def traced_from(model: HFModel) -> tuple[object, str]:
    """What a captured pass of the model depends on, as the last `HFModel.header` saw it.

    Returns:
        Something that differs where the model has changed; and which hook runs Python in a
        forward, so that no pass is captured, empty for none.
    """
    seen, hooked = [], ""
    for name, module in model.modules:
        inside = vars(module)  # at every link: attributes of modules are slow
        adapters = ""
        if "_active_adapter" in inside or "_disable_adapters" in inside:  # peft's
            adapters = f"{inside.get('_active_adapter')}{inside.get('_disable_adapters')}"
        seen.append((id(module), inside.get("forward"), adapters))
        if inside["_forward_hooks"] or inside["_forward_pre_hooks"]:
            hooks = (*inside["_forward_hooks"].values(), *inside["_forward_pre_hooks"].values())
            if any(_package(hook) not in _LOOK_ON for hook in hooks):
                hooked = f"a forward hook on {name or type(module).__name__} runs Python"
    return (model.weights_seen, model.attention.own, seen), hooked


def _package(function: Any) -> str:
    """The package that a function, or the method of an object, is from."""
    return str(getattr(function, "__module__", type(function).__module__)).split(".")[0]
