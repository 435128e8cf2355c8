"""Which of two models' images are better: scorers, win rates with intervals, and the pages that show them."""
