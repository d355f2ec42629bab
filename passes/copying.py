"""How is a Dynamo graph copied? With its placeholders' sources, which later stages read."""

from torch.fx import Graph, GraphModule, Node


def copy(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A graph module with its own graph and the same attributes, and the old-to-new nodes."""
    graph, copies = Graph(), dict[Node, Node]()
    output = graph.graph_copy(gm.graph, copies)
    graph.output(output)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    result = GraphModule(gm, graph)
    result.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        result._param_name_to_source = gm._param_name_to_source
    return result, copies
