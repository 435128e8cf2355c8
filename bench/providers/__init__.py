"""Ways to train on preference pairs, side by side; `bench.train_step` measures them."""
