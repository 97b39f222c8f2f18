"""What the training examples share: settings, text, model, expert parallelism, one run."""
