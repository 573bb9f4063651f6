"""What a run will need before it is run: tensors, memory and warnings, without loading a weight."""
