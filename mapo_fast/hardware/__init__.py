"""The machine: cards and their rates, a GPU and its allocator, system RAM, the driver."""
