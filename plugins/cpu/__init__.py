"""Own kernels for the CPU: a library of ONNX Runtime ops in C++, compiled where it runs.

It lies under plugins because it implements their contracts and needs nothing else of the project: runtime may import it, and
so may tests. The graph that uses it is written by `export/lowering/onnxruntime/native.py`.
"""
