"""What prompts have in common, so that it is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, the last token of each left out."""
    # What the first and the last prompt in lexical order share, all between them share too.
    low = min(map(list, prompts))
    high = max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if low[i] != high[i]), limit)


@dataclass(frozen=True)
class Places:
    """Where tokens, by their numbers in a forward, stand: a cache row, and a position in it. int64 `[tokens]` each."""

    tokens: Array
    rows: Array
    positions: Array

    @classmethod
    def of(cls, rows: Array, positions: Array) -> Places:
        """The places of tokens 0, 1, 2, ..., from int64 `[tokens]` each."""
        return cls(np.arange(len(rows)), rows, positions)

    def between(self, start: int, stop: int) -> Places:
        """Those of tokens `start` to `stop`, counted from `start`; tokens must be in order."""
        first, last = np.searchsorted(self.tokens, (start, stop))
        return Places(self.tokens[first:last] - start, self.rows[first:last], self.positions[first:last])


@dataclass(frozen=True)
class PromptTree:
    """Prompts as a tree with a node for each different beginning; every node stands after its parent.

    Attributes:
        ids: `[nodes]`, each node's token.
        nodes: each node's place, in the row of one prompt that begins so.
        cached: the place of each token of each prompt, by rising node.
        last: `[prompts]`, the node of each prompt's last token.
        leaves: the nodes in `last`, once each, rising.
    """

    ids: Array
    nodes: Places
    cached: Places
    last: Array
    leaves: Array

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], shared: int, owners: Sequence[int] = ()) -> PromptTree:
        """The tree of what follows the first `shared` tokens, which all prompts have in common and all exceed.

        Args:
            prompts: token ids.
            shared: how many of their first tokens are left out.
            owners: of the prompts, by default one of all: what prompts of two owners have in common they do not share.
        """
        owner = np.array(owners if owners else [0] * len(prompts))
        # 1. Sort the prompts, so that those that begin alike are neighbours; lay them out in lines, filled up with -1.
        order = np.array(sorted(range(len(prompts)), key=lambda i: (owner[i], list(prompts[i]))))
        own = np.array([len(prompts[i]) - shared for i in order])
        ids = np.full((len(order), own.max()), -1)
        for line, i in enumerate(order):
            ids[line, : own[line]] = prompts[i][shared:]
        # 2. A token is a new node from where its prompt first differs from the one before.
        new = np.ones(ids.shape, np.bool_)
        another = owner[order[1:]] != owner[order[:-1]]
        new[1:] = np.logical_or.accumulate((ids[1:] != ids[:-1]) | another[:, None], axis=1)
        new &= ids >= 0
        # 3. Number the nodes line by line. A token that is no new node is the nearest one above it.
        node = np.maximum.accumulate(np.where(new, new.cumsum().reshape(ids.shape) - 1, -1), axis=0)
        # 4. Note each node once, in the row of the prompt that brought it.
        row, place = np.nonzero(new)
        nodes = Places.of(order[row], place + shared)
        # 5. Note each token of each prompt with its node, by rising node.
        row, place = np.nonzero(ids >= 0)
        by_node = np.argsort(node[row, place], kind="stable")
        row = row[by_node]
        place = place[by_node]
        # 6. Find the node that each prompt ends in, prompts in the order in which they were given.
        last = np.empty(len(order), np.int64)
        last[order] = node[np.arange(len(order)), own - 1]
        return cls(ids[new], nodes, Places(node[row, place], order[row], place + shared), last, np.unique(last))
