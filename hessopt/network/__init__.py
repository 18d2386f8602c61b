"""The network as an optimizer sees it: layers, uses of parameters, their graph and its cliques, hooks, arguments."""
