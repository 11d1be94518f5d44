"""`model.generate` with a retention policy, loaded by transformers from this folder.

model.generate(
    **inputs,
    custom_generate="examples/custom_generate",
    trust_remote_code=True,
    policy="RaaS",
    policy_arguments={"budget": 1024},
    max_new_tokens=2048,
)
"""

from dataclasses import MISSING, fields
from typing import Any

try:
    import sparsity
    from sparsity.hf.attach import keep_attached
    from sparsity.policies.base import Policy
except ImportError as error:
    raise ImportError(
        "this folder needs the package `sparsity` of the distribution `picache`; the distribution "
        "named `sparsity` on PyPI is another one"
    ) from error


def generate(
    model: Any,
    policy: Policy | str = "RaaS",
    policy_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """What `model.generate(**arguments)` returns, decoding under the policy.

    The model is attached or not afterwards as it was before.

    Args:
        model: a transformers model for text generation.
        policy: a policy such as `sparsity.RaaS(budget=1024)`, or the name of one.
        policy_arguments: of a policy given by name.
        arguments: of `generate`. A cache of transformers in `past_key_values` is read and gone on
            from, and stays as it is; a `SparseCache` has its policy already and is refused.

    Raises:
        SparsityError: on an unknown name, an unknown or missing argument, a `SparseCache`, and as
            `sparsity.SparseCache` does.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    past = given.pop("past_key_values", None)
    if isinstance(past, sparsity.SparseCache):
        raise sparsity.SparsityError(
            "past_key_values is a SparseCache, which decodes under its own policy: call "
            "model.generate(..., past_key_values=cache) without custom_generate"
        )
    chosen = _policy(policy, policy_arguments or {})
    with keep_attached(model):
        cache = sparsity.SparseCache(model, chosen, past=past)
        return model.generate(**given, past_key_values=cache)


def _policy(policy: Policy | str, arguments: dict[str, Any]) -> Policy:
    if not isinstance(policy, str):
        if arguments:
            raise sparsity.SparsityError(
                f"policy={policy!r} has its arguments already: leave out policy_arguments, or give "
                "the policy by name"
            )
        return policy
    known = {name: getattr(sparsity.policies, name) for name in sparsity.policies.__all__}
    if policy not in known:
        raise sparsity.SparsityError(
            f"policy={policy!r} is no policy: give one of {', '.join(sorted(known))}"
        )
    accepted = [field.name for field in fields(known[policy]) if field.init]
    if unknown := sorted(set(arguments) - set(accepted)):
        raise sparsity.SparsityError(
            f"{policy} takes no argument {', '.join(unknown)}: it has {', '.join(accepted)}"
        )
    needed = [f.name for f in fields(known[policy]) if f.init and f.default is MISSING]
    if missing := sorted(set(needed) - set(arguments)):
        raise sparsity.SparsityError(
            f"{policy} needs {', '.join(missing)}: give it in policy_arguments, such as "
            f"policy_arguments={{'{missing[0]}': ...}}"
        )
    return known[policy](**arguments)
