"""A run's figures where people look at them: MLflow, TensorBoard and Weights & Biases, each by one
line of `[tracking]`. Each is a set of `Callbacks`, as a user's own."""
