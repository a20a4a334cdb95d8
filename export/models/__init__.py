"""Model families: one folder each, found by config.json's model_type through `registry`."""
