"""Dimensions as sequences of atoms: pieces of a size, of which some run along each other and some are addressed."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from torch.fx import Node

KEPT = 2
"""Elements that are kept of what is never addressed: two, to tell numbers from tensors."""

Atoms: TypeAlias = "tuple[int, ...]"
Label: TypeAlias = "tuple[Any, ...]"


class SplitError(Exception):
    """An atom was split: the dimensions are read again (internal)."""


class Pieces:
    """All atoms of a part of a graph: which are the same, which are made of two others, which are addressed."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self._parent: list[int] = []
        self._pinned: list[bool] = []
        self._parts: dict[int, tuple[int, int]] = {}
        self._fresh: dict[tuple[Node, Any], int] = {}

    def root(self, a: int) -> int:
        while self._parent[a] != a:
            self._parent[a] = self._parent[self._parent[a]]
            a = self._parent[a]
        return a

    def atoms(self, key: tuple[Node, Any], size: int) -> Atoms:
        """The atoms of a dimension that begins here."""
        if size == 1:
            return ()
        if key not in self._fresh:
            self._fresh[key] = self._new(size)
        return self._flat(self._fresh[key])

    def _new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self.size.append(size)
        self._pinned.append(False)
        return len(self._parent) - 1

    def _flat(self, a: int) -> Atoms:
        a = self.root(a)
        if a not in self._parts:
            return (a,)
        first, second = self._parts[a]
        return (*self._flat(first), *self._flat(second))

    def pin(self, atoms: Atoms) -> Atoms:
        for a in atoms:
            for b in self._flat(a):
                self._pinned[self.root(b)] = True
        return atoms

    def split(self, a: int, first: int) -> None:
        a = self.root(a)
        parts = (self._new(first), self._new(self.size[a] // first))
        self._parts[a] = parts
        if self._pinned[a]:
            self.pin(parts)
        raise SplitError

    def union(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self._parent[b] = a
            self._pinned[a] |= self._pinned[b]

    def join(self, x: Atoms, y: Atoms) -> Atoms:
        """The atoms of two dimensions that run along each other; () is a broadcast one."""
        if not x or not y:
            return x or y
        left, right = list(x), list(y)
        for a, b in zip(left, right, strict=False):
            m, n = self.size[self.root(a)], self.size[self.root(b)]
            if m == n:
                self.union(a, b)
            elif m % n == 0:
                self.split(a, n)
            elif n % m == 0:
                self.split(b, m)
            else:
                self.pin((*x, *y))
                return x
        return x

    def held(self, a: int) -> int:
        a = self.root(a)
        return self.size[a] if self._pinned[a] else min(self.size[a], KEPT)

    def label(self, atoms: Atoms) -> Label:
        if any(not self._pinned[self.root(a)] for a in atoms):
            return ("along", *map(self.root, atoms))
        return ("size", math.prod(self.size[self.root(a)] for a in atoms))
