"""Where do the numbers differ? Every layer alone, tensor by tensor, on the same inputs as its formulas."""
