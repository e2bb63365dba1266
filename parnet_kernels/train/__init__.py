"""Training: `parnet train`. Settings and recipes, data, augmentation, checkpoints, logs, ranks, and the loop."""
