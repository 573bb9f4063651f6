"""Tasks: records, prompts, training examples and evaluators."""
