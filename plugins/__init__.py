"""The custom ops of the step graph, one folder each: `op.py` is the contract, every other form derives from it.

ops.py lists them; step_graph.py is the contract of the graph around them.
"""
