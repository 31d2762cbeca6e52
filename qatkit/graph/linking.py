"""Activations in the graph of a block whose only reader quantizes: one pass for both."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qatkit.nn.links import BY_FUNCTION, activated, is_link


def link_activations(graph: fx.Graph, block: nn.Module) -> None:
    """Let `qatkit.nn.links.activated` take the place of activations in the graph of a block.

    Of those that read the result of a layer which nothing else reads, and whose own result goes to
    one quantizer, or one layer with a quantizer, and nowhere else.

    Args:
        graph: what the block does; its module targets are paths relative to the block.
        block: the block.
    """
    for node in list(graph.nodes):
        producer, reader = _alone_before(node), _alone_behind(node)
        if producer is None or reader is None:
            continue
        before, behind = (block.get_submodule(str(each.target)) for each in (producer, reader))
        as_module = node.op == "call_module"
        activation: Any = block.get_submodule(str(node.target)) if as_module else node.target
        if not is_link(before, activation, behind):
            continue
        with graph.inserting_before(node):
            ends = [graph.get_attr(str(each.target)) for each in (producer, reader)]
            if as_module:
                itself = graph.get_attr(str(node.target))
                linked = graph.call_function(activated, (ends[0], itself, ends[1], producer))
            else:
                ends += node.args
                linked = graph.call_function(BY_FUNCTION[activation], tuple(ends), node.kwargs)
        node.replace_all_uses_with(linked)
        graph.erase_node(node)


def _alone_before(node: fx.Node) -> fx.Node | None:
    """Return the module call whose result a node reads, if it alone does, and nothing else."""
    if node.op not in ("call_module", "call_function") or len(node.all_input_nodes) != 1:
        return None
    source = node.all_input_nodes[0]
    first = bool(node.args) and node.args[0] is source
    alone = first and source.op == "call_module" and list(source.users) == [node]
    return source if alone else None


def _alone_behind(node: fx.Node) -> fx.Node | None:
    """Return the module call that alone reads the result of a node, and nothing else."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    return reader if reader.op == "call_module" and reader.args == (node,) else None
