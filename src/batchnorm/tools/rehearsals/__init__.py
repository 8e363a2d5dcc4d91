"""Forward passes as in training, for the batch norms alone, that leave no trace in the model."""
