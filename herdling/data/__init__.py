"""Where training examples come from and how they become batches."""
