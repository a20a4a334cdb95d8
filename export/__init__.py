"""From a checkpoint to a bundle: configuration, weights, model definition, graph, lowering per target."""
