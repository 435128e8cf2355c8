"""SDXL: its pipeline folder, its parts and what is put into its UNet."""
