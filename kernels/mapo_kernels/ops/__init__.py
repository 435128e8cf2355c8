"""The operators, a module each, with their kernels in modules beside them."""
