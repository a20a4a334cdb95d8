"""Valid inputs of a step graph for Polygraphy, whose own random ones would point outside the vocabulary and the cache:

    polygraphy check lint GRAPH.onnx --data-loader-script tests/export/polygraphy_inputs.py
    polygraphy run GRAPH.onnx --onnxrt --data-loader-script tests/export/polygraphy_inputs.py

One step of 5 tokens: 3 of a sequence that has 2 in the cache, and 2 of a new one. Caches, and weights where the graph takes
them as inputs, are small random numbers. Polygraphy hands a script no arguments: the model is read from its command line.
"""

import sys

import numpy as np
import onnx

from latentrt.runtime.backends.base import SequenceRows, pack

_ROWS = SequenceRows([1, 2, 3], cached_length=2, logits=[2]), SequenceRows([4, 5], cached_length=0, logits=[1])
_BATCH = vars(pack(_ROWS, np.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])))
_PAGES = 8


def load_data():
    """Called by Polygraphy: yields one dictionary of inputs."""
    model = onnx.load(next(a for a in sys.argv if a.endswith(".onnx")), load_external_data=False)
    random = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name in _BATCH:
            feeds[value.name] = _BATCH[value.name]
        else:
            shape = [d.dim_value or _PAGES for d in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            feeds[value.name] = (random.standard_normal(shape) * 0.1).astype(dtype)
    yield feeds
