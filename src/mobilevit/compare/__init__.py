"""The systems that the MobileViT paper compares itself with, as networks that build, train and export."""
