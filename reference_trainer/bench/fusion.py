"""The kernels of a compiled graph: products, and fused kernels of the operations between them.

The rules are inductor's fusion rules, as far as they decide how often a tensor is read:

- A pointwise operation is computed where it is used. A tensor is stored in memory only if a
  product, the user of a reduction in another kernel, or the graph's output needs it.
- Operations with the same rows that depend on the same products form one kernel, if one uses the
  result of another or both read a tensor of at least half their own size.
- A sum over rows is a separate kernel, whose last stage is fused with the next operation.
"""

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from reference_trainer.bench.kernels import Kernel, is_free, of_call, size

_REDUCTIONS = ("sum", "mean", "amax", "amin", "var", "prod", "any", "all", "argmax", "var_mean")
_EXTERN = (
    *("mm", "addmm", "bmm", "addmm_", "sum_of_products", "embedding_dense_backward"),
    *("_scaled_dot_product_flash_attention_for_cpu", "embedding", "sort", "index_put"),
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


def of_graph(graph: fx.Graph) -> list[Kernel]:
    """Return the kernels of a graph of `aten` operations, as AOTAutograd gives it to a backend."""
    return _Fusion(graph).kernels()


class _Fusion:
    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.extern = [n for n in self.nodes if _name(n) in _EXTERN]
        self.level: dict[fx.Node, int] = {}
        for node in self.nodes:
            above = [self.level[i] + (_name(i) in _EXTERN) for i in node.all_input_nodes]
            self.level[node] = max(above, default=0)
        self.roots = [n for n in self.nodes if self._is_root(n)]
        self._is = set(self.roots)
        self.leaves = {root: self._leaves(root) for root in self.roots}

    def kernels(self) -> list[Kernel]:
        found = [kernel for node in self.extern for kernel in _calls(node)]
        for group in self._groups():
            outside = {leaf for root in group for leaf in self.leaves[root]} - set(group)
            read = sum(map(_bytes, outside))
            written = sum(_bytes(r) for r in group if self._leaves_group(r, group))
            name = " ".join(dict.fromkeys(_name(r) for r in group))
            found.append(Kernel(f"fused {name}", 0, read, written))
        return found

    def _is_root(self, node: fx.Node) -> bool:
        """Whether a fused node is stored in memory or is a reduction."""
        if node.op != "call_function" or node in self.extern or _transparent(node):
            return False
        return _name(node) in _REDUCTIONS or any(self._stored_by(user) for user in node.users)

    def _stored_by(self, user: fx.Node) -> bool:
        if user.op == "output" or _name(user) in _EXTERN:
            return True
        return _transparent(user) and any(self._stored_by(one) for one in user.users)

    def _leaves(self, root: fx.Node) -> set[fx.Node]:
        """Return the nodes that a root's kernel reads: inputs, products, and other roots."""
        found, waiting, seen = set(), list(root.all_input_nodes), set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            of_extern = node.target is operator.getitem and node.args[0] in self.extern
            stored = of_extern or node in self._is or node in self.extern
            stored = stored or node.op != "call_function"
            if stored:
                found.add(node)
            else:
                waiting += node.all_input_nodes
        return found

    def _groups(self) -> list[list[fx.Node]]:
        groups: list[list[fx.Node]] = []
        for root in self.roots:
            joined = [g for g in groups if self._fuse(root, g)]
            merged = [one for g in joined for one in g] + [root]
            groups = [g for g in groups if g not in joined] + [merged]
        return groups

    def _fuse(self, root: fx.Node, group: list[fx.Node]) -> bool:
        first = group[0]
        if self.level[root] != self.level[first] or _over_rows(root) or _over_rows(first):
            return False
        if any(one in self.leaves[root] for one in group):
            return True
        shared = {leaf for one in group for leaf in self.leaves[one]} & self.leaves[root]
        return any(2 * _entries(leaf) >= _entries(root) for leaf in shared)

    def _leaves_group(self, root: fx.Node, group: list[fx.Node]) -> bool:
        if any(self._stored_by(user) for user in root.users):
            return True
        return any(root in self.leaves[other] for other in self.roots if other not in group)


def _calls(node: fx.Node) -> list[Kernel]:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    return of_call(node.target, args, dict(kwargs), node.meta["val"])


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return target.name().split("::")[-1].split(".")[0] if hasattr(target, "name") else ""


def _transparent(node: fx.Node) -> bool:
    """Whether a node is only a view of its input."""
    return node.target is operator.getitem or is_free(node.target)


def _over_rows(node: fx.Node) -> bool:
    """Whether a reduction is over any dimension but the last."""
    if _name(node) not in _REDUCTIONS:
        return False
    (given,) = node.all_input_nodes[:1]
    dims: Iterable[int] = node.args[1] if len(node.args) > 1 else range(given.meta["val"].ndim)  # type: ignore[assignment]
    last = given.meta["val"].ndim - 1
    return any(dim % (last + 1) != last for dim in dims)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def _bytes(node: fx.Node) -> int:
    return sum(map(size, _tensors(node)))


def _entries(node: fx.Node) -> int:
    return sum(one.numel() for one in _tensors(node))
