"""The operators, a module each, with their kernels in modules next to them."""
