"""What a right engine's errors are: the formulas with an engine's roundings, on the same inputs, through the whole model."""
