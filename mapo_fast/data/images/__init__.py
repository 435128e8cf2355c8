"""An image's file: formats, decoding, colour."""
