"""Several processes, a GPU each, that share a model's experts and run their steps together. See docs/many-gpus.md."""
