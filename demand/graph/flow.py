"""Steps of an application from which its runs could not end."""

from collections.abc import Collection, Mapping

from demand.units import END


def without_end(successors: Mapping[str, Collection[str]]) -> list[str]:
    """Names from which no chain of successors leads to "end", in the order given."""
    ending = {END}
    while more := {
        name for name, after in successors.items() if name not in ending and ending & set(after)
    }:
        ending |= more
    return [name for name in successors if name not in ending]
