"""What is saved of a run: models and optimizers in every cut, generators, values; and which rank saves which share."""
