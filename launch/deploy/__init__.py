"""What is done with a trained model: export it to a file, and predict with it."""
