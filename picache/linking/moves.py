"""Where the parts of a prompt go, and how their keys are rotated on the way."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from picache.hf.rope import difference
from picache.kernels.tables import Piece, Turn
from picache.methods.base import Layout

if TYPE_CHECKING:
    from picache.hf.model import HFModel


class Moves:
    """The moves of all parts of a prompt, or of several prompts of a batch.

    Args:
        model: the model the parts were compiled with.
        pieces: where each part goes; `Piece.turn` counts the tokens that are rotated.
        old: rotary positions of the tokens that are rotated, as compiled; int64 ``[tokens]``.
        new: those they are moved to.
    """

    def __init__(self, model: "HFModel", pieces: Sequence[Piece], old: Tensor, new: Tensor) -> None:
        self.model, self.pieces, self.old, self.new = model, pieces, old, new
        self._turns: dict[Hashable, Turn] = {}

    @classmethod
    def of(
        cls, model: "HFModel", layout: Layout, skips: Sequence[int], positions: Tensor
    ) -> "Moves":
        """The moves of one prompt; its first part, the exact prefix, is not rotated.

        Args:
            model: the model the parts were compiled with.
            layout: where the chunks stand.
            skips: how many of the first tokens of each part, its sinks, are left out; one more than
                there are chunks where the query was compiled too.
            positions: rotary positions of the prompt's tokens, int64 ``[tokens]``.
        """
        lengths = (*layout.chunk_lengths, layout.query_length)
        starts = (*layout.starts, layout.context_length)
        pieces: list[Piece] = []
        old = [torch.empty(0, dtype=torch.int64)]
        moved = 0
        for length, start, skip in zip(lengths, starts, skips, strict=False):
            turn = moved if pieces else -1
            if pieces:
                old.append(torch.arange(skip, skip + length))
                moved += length
            pieces.append(Piece(skip + length, skip, 0, start, turn))
        at = slice(layout.prefix_length, layout.prefix_length + moved)
        return cls(model, pieces, torch.cat(old), positions[at])

    @classmethod
    def together(cls, moves: Sequence["Moves"], rows: Sequence[int]) -> "Moves":
        """The moves of several prompts, each to a row of the batch."""
        if len(moves) == 1 and rows[0] == 0:
            return moves[0]
        pieces: list[Piece] = []
        moved = 0
        for each, row in zip(moves, rows, strict=True):
            for piece in each.pieces:
                turn = piece.turn + moved if piece.turn >= 0 else -1
                pieces.append(piece._replace(row=row, turn=turn))
            moved += len(each.old)
        old, new = (torch.cat(part) for part in zip(*((m.old, m.new) for m in moves), strict=True))
        return cls(moves[0].model, pieces, old, new)

    def turn(self, layer: int) -> Turn | None:
        """How the keys of a layer are rotated; the same object for layers that share it."""
        rotation = self.model.rotations[layer]
        if rotation is None or not len(self.old):
            return None
        # Those of different types may rotate by other angles (Gemma 3).
        kind = (rotation, self.model.rotary.layer_type(layer))
        if kind not in self._turns:
            old = self.model.angles(layer, self.old)
            cos, sin = difference(old, self.model.angles(layer, self.new))
            how = (rotation.pairing, rotation.offset, rotation.part)
            self._turns[kind] = Turn(cos.contiguous(), sin.contiguous(), *how)
        return self._turns[kind]
