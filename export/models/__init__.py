"""Model definitions: one file per family, looked up by config.json's model_type."""
