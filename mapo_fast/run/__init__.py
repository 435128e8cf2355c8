"""One run from its first check to its result: training, its folder, log, evaluation, previews."""
