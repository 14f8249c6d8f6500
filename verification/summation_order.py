"""Reveal the order in which an operator adds up, from its results alone.

    python -m verification.summation_order              # n = 128 summands
    python -m verification.summation_order --summands 16 --tree

These are the probes of Xie, Gao, Wang and Xue, "Revealing floating-point accumulation orders in
software/hardware implementations" (FPRev, USENIX ATC 2025). Among n summands number i is M = 2^100, number
j is -M, and all others are 1. Each 1 that is added to M or -M before these two meet is lost, and so the
result is n minus the number of leaves under the lowest common ancestor of i and j in the tree of additions.
All pairs together determine the tree. A sum that is rounded once is n - 2 for every pair, which no tree of
more than two leaves explains.

The exit status is 1 if an exact result is not n - 2, or if native PyTorch reveals no tree.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

import reproml

M = 2.0**100  # in binary64, too, M + n = M
Tree = Any  # the index of a summand, or a list of two trees
Leaves = list[list[float]]  # of each pair, the number of leaves under the lowest common ancestor


def conv2d(x: Tensor) -> Tensor:
    """Return the only element of each channel's result; the number of summands is a multiple of 4."""
    return F.conv2d(x.view(1, -1, 2, 2), torch.ones(8, len(x) // 4, 2, 2))


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mm": lambda x: x.expand(8, -1).contiguous() @ torch.ones(len(x), 8),
    "addmm": lambda x: torch.addmm(
        x[:1].expand(8, 8), x[1:].expand(8, -1).contiguous(), torch.ones(len(x) - 1, 8)
    ),
    "conv2d": conv2d,
}


def probe(add: Callable[[Tensor], Tensor], n: int) -> tuple[Leaves, int]:
    """Return the number of leaves that the result's first element shows for each pair of summands, and how
    many probes gave any element other than n - 2."""
    leaves, wrong = [[0.0] * n for _ in range(n)], 0
    for i in range(n):
        for j in range(i + 1, n):
            x = torch.ones(n)
            x[i], x[j] = M, -M
            results = add(x).flatten().tolist()
            leaves[i][j] = leaves[j][i] = n - results[0]
            wrong += set(results) != {n - 2.0}
    return leaves, wrong


def tree_of(leaves: Leaves) -> Optional[Tree]:
    """Return the tree of additions that gives these numbers of leaves, or None if there is none."""

    def build(members: list[int]) -> Tree:
        first, *others = members
        tree: Tree = first
        for count in sorted({leaves[first][j] for j in others}):
            tree = [tree, build([j for j in others if leaves[first][j] == count])]
        return tree

    tree = build(list(range(len(leaves))))
    return tree if leaves_of(tree, len(leaves)) == leaves else None


def leaves_of(tree: Tree, n: int) -> Leaves:
    """Return the number of leaves under the lowest common ancestor of each pair of a tree's n summands."""
    leaves = [[0.0] * n for _ in range(n)]

    def visit(node: Tree) -> list[int]:
        if isinstance(node, int):
            return [node]
        left, right = map(visit, node)
        for i in left:
            for j in right:
                leaves[i][j] = leaves[j][i] = len(left) + len(right)
        return left + right

    visit(tree)
    return leaves


def depth(tree: Tree) -> int:
    return 0 if isinstance(tree, int) else 1 + max(map(depth, tree))


class Found(NamedTuple):
    wrong: int  # probes whose result is not n - 2
    tree: Optional[Tree]

    def __str__(self) -> str:
        if not self.wrong:
            return "every probe gives n - 2: no tree"
        if self.tree is None:
            return f"{self.wrong} probes differ from n - 2, but show no binary tree"
        name = hashlib.sha256(repr(self.tree).encode()).hexdigest()[:8]
        return f"{self.wrong} probes differ from n - 2: tree {name}, depth {depth(self.tree)}"


def find(add: Callable[[Tensor], Tensor], n: int) -> Found:
    leaves, wrong = probe(add, n)
    return Found(wrong, tree_of(leaves))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--summands", type=int, default=128, help="a multiple of 4")
    parser.add_argument("--tree", action="store_true", help="print the trees")
    args = parser.parse_args()
    n, failures = args.summands, 0
    print(f"{n} summands, {n * (n - 1) // 2} probes, PyTorch {torch.__version__}")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for name, add in OPERATORS.items():
        native = find(add, n)
        with reproml.exact():
            exact = find(add, n)
        failures += native.tree is None or bool(exact.wrong)
        print(f"{name:7} native  {native}\n{'':7} exact   {exact}", flush=True)
        if args.tree:
            print(f"{'':7} {native.tree}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
