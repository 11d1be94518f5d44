"""The token ids that a cache has seen, as far as they are known without work for each token."""

from typing import Any

import torch
from torch import Tensor

from sparsity.errors import SparsityError
from sparsity.retention.batch_rows import FULL_PROMPT


class SeenTokens:
    """What tells whether a text goes on from what a cache has seen.

    The whole text that `generate` is at is kept by reference, so that a decoded token costs
    nothing. Of forwards outside `generate` the ids are kept while they bring several tokens, and no
    longer once a single token comes. The ids behind embeddings, or of a `past`, are not known.

    Attributes:
        ids: of the first columns, int64 `[batch, columns]`; None while none are known.
        prompt: columns that came before the first single token.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.prompt = 0
        self._taken: list[Tensor] = []  # rows taken since `ids` was set, one after the other
        self._handed: Tensor | None = None  # to `generate`; what is new in it is about to be fed
        self._in_chunks = False  # whether `generate` has fed a text that is still to be compared

    def hand(self, ids: Tensor, arguments: dict[str, Any], seen: int) -> None:
        """Note the text that `generate` is at, before what is new in it is fed to the model.

        When `generate` begins, the text is compared with what was fed; while it decodes, it is not.
        Of a prompt in chunks (`prefill_chunk_size`) the whole text is shown only once the chunks
        are fed: it is compared then.

        Args:
            ids: the text, int64 `[batch, tokens]`.
            arguments: the other arguments of this step of `generate`.
            seen: columns that were fed so far.

        Raises:
            SparsityError: unless the text begins with what was fed.
        """
        self._handed = None
        if arguments.get("inputs_embeds") is not None or ids.dim() != 2:
            return
        if seen and arguments.get("next_sequence_length") is None:
            self._in_chunks = True
            return  # nothing is to be cut off: a chunk of a prompt, or new tokens alone
        if self._in_chunks:
            self._in_chunks = False
            if ids.shape[1] == seen + 1:  # the whole text, and the first token that it gave
                self._check(ids, arguments.get("attention_mask"), seen, in_chunks=True)
        begins = arguments.get("is_first_iteration", False)
        if begins and seen:
            self._check(ids, arguments.get("attention_mask"), seen)
        self._handed = ids.clone() if begins else ids

    def feed(self, new: Tensor | None, seen: int, stop: int) -> None:
        """Note what a forward brought.

        Args:
            new: its ids, int64 `[batch, tokens]`; None where there are none.
            seen: its first column.
            stop: column after its last.
        """
        handed, self._handed = self._handed, None
        if not self.prompt or (self.prompt == seen and stop - seen > 1):
            self.prompt = stop
        if handed is not None and handed.shape[1] == stop:
            self._set(handed)
        elif new is not None and seen == 0:
            self._set(new.clone())
        elif new is not None and new.shape[1] > 1:
            known = self._known(new, seen)
            if known is not None and known.shape[1] == seen:
                self._set(torch.cat([known, new.to(known.device)], dim=1))

    def follow(self, ids: Tensor) -> None:
        """Note the text of a step that is checked by `AllLayers.arm`, by reference."""
        self._handed = None
        if self.ids is not None and ids.dim() == 2 and self.ids.shape[0] <= ids.shape[0]:
            self._set(ids)

    def drop_handed(self) -> None:
        """Forget the text noted by `hand`, since it was not fed."""
        self._handed = None

    def take(self, index: Tensor) -> None:
        """Keep the rows of `index` (numbers or a bool mask), in that order; done when needed."""
        if self.ids is not None:
            self._taken.append(index)

    def check_not_again(self, new: Tensor, seen: int) -> None:
        """Refuse a forward whose new tokens begin with the prompt once more, two tokens or more.

        Waits for the device.

        Args:
            new: its ids, int64 `[batch, tokens]`.
            seen: columns so far.

        Raises:
            SparsityError: for tokens that are fed again.
        """
        prompt = self.prompt
        if prompt < 2 or new.shape[1] < prompt:
            return
        known = self._known(new, prompt)
        if known is None or known.shape[1] < prompt:
            return
        if _first_difference(known, new, None) is None:
            again = f"{seen}" if prompt == seen else f"first {prompt} of the {seen}"
            raise SparsityError(
                f"the {again} tokens that the cache has seen are fed again: a forward takes what "
                "is new, such as input_ids[:, cache.get_seq_length():] (generate cuts that out by "
                "itself). If the text does repeat itself, say so by position_ids or an "
                f"attention_mask of all {seen + new.shape[1]} tokens; for another text call "
                "cache.reset()"
            )

    def _check(self, ids: Tensor, mask: Tensor | None, seen: int, in_chunks: bool = False) -> None:
        """Refuse a text that does not begin with what is known of the first `seen` columns.

        Args:
            ids: the text, int64 `[batch, tokens]`.
            mask: nonzero for real tokens, as `ids`; None when all are real.
            seen: columns that were fed so far.
            in_chunks: whether what was new in it was fed already, in chunks.
        """
        if ids.shape[1] < seen:
            raise SparsityError(
                f"generate was given {ids.shape[1]} tokens, and the cache has seen {seen}: none of "
                f"them is new. {FULL_PROMPT}"
            )
        known = self._known(ids, seen)
        first = None if known is None else _first_difference(known, ids, mask)
        if known is not None and first is not None:
            row, column = first
            if in_chunks:
                raise SparsityError(
                    "generate has fed in chunks (prefill_chunk_size) what was new by length in a "
                    "text that does not begin with what the cache had seen: at token "
                    f"{column} of row {row} it had seen {int(known[row, column])} and was "
                    f"given {int(ids[row, column])}. What the cache holds is of two texts now: "
                    "call cache.reset()"
                )
            raise SparsityError(
                f"the cache holds another text than generate was given: at token {column} of row "
                f"{row} it has seen {int(known[row, column])} and was given "
                f"{int(ids[row, column])}. For another prompt call cache.reset() or make a new "
                "SparseCache; to go on with this text, hand generate the full input_ids of the "
                "conversation, as it was fed and answered"
            )

    def _set(self, ids: Tensor) -> None:
        self.ids, self._taken = ids, []

    def _known(self, ids: Tensor, seen: int) -> Tensor | None:
        """The ids known of the first `seen` columns, a row for each of `ids`; None for none."""
        if self.ids is None or ids.dim() != 2:
            return None
        known = self.ids[:, :seen]
        for index in self._taken:
            known = known[index.to(known.device)]
        if known.shape[1] == 0 or ids.shape[0] % known.shape[0]:
            return None
        return known.repeat_interleave(ids.shape[0] // known.shape[0], dim=0)


def _first_difference(known: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[int, int] | None:
    """Row and column of the first id that differs; ids at padding are not compared.

    Args:
        known: `[batch, columns]`.
        ids: `[batch, columns or more]`.
        mask: nonzero for real tokens, as `ids`; None when all are real.
    """
    width = known.shape[1]
    other = known != ids[:, :width].to(known.device)
    if mask is not None:
        other = other & mask[:, :width].to(device=known.device, dtype=torch.bool)
    places = other.T.nonzero()  # by column first
    return (int(places[0, 1]), int(places[0, 0])) if len(places) else None
