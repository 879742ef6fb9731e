"""Auxiliary networks: CLIP, DINOv2, Inception, LPIPS and the safety checker."""
