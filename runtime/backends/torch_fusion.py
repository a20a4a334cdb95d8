"""stub"""
def table(): return {}
def fuse(nodes, constants, outputs): return nodes
