"""MobileViT: exact weights from everywhere, training as in the paper, fast deployment."""
