"""The studio: from a folder of pictures to a better model. Nothing here imports torch or numpy."""
