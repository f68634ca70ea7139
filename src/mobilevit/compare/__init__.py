"""The models that the MobileViT paper compares with, as networks that can be built, trained and exported."""
