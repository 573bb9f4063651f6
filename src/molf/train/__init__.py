"""Training with TRL's SFTTrainer: arguments, data, callbacks and the run itself."""
