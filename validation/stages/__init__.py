"""The links of the comparison chain: torch model, exported graph, engine."""
