"""How do other libraries reach the engine without `torch.compile`? One module a library."""
