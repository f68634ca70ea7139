"""The networks: MobileViT, and detection and segmentation on it."""
