"""The demo backbone: the scenes that it is trained on, its tokenizer and its training."""
