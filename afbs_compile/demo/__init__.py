"""The demo: a real model, a real text, one line of `torch.compile`, honest figures."""
