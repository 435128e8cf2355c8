"""Predicts memory and time of a training step without a GPU or weights, and chooses the settings that fit."""
