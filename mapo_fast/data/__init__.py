"""Preference data: from image pairs on disk to a cache of latents and prompt embeddings."""
